"""Kill a tuner and its runs with SIGKILL at random moments, with real training on this machine.

Run: ``python tests/bench/stress_tune.py [KILLS]``; ten kills take some minutes. The exit status is 1 unless the killed
campaign ends in exactly the trials and losses of an undisturbed one, and no finished run was trained again.
`tests/sweeps/test_tune.py` has the same test without training.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from tuned import TUNE, loader, trial_outcomes

from scaling.run.directory import RunDirectory
from sweeps.tuning.tuner import Tuner, tune

SMALL = TUNE.replace("trials = 8", "trials = 4").replace("startup = 4", "startup = 2").replace('\nheld_out = ["c"]', "")
SCRIPT = """
import sys
from sweeps.config.campaign import load_campaign
from sweeps.tuning.tuner import tune
if __name__ == "__main__":
    sys.exit(0 if tune(load_campaign(sys.argv[1]), sys.argv[2], workers=2, progress=False).complete else 3)
"""


def kill_all(tuner: subprocess.Popen[bytes], root: Path) -> int:
    """Kill the tuner and every run that is training; return the number of runs."""
    os.killpg(tuner.pid, signal.SIGKILL)
    hit = 0
    for folder in (root / "runs").glob("*"):
        directory = RunDirectory(folder)
        attempts = directory.attempts()
        if attempts and attempts[-1].event == "start" and directory.is_locked():
            with contextlib.suppress(ProcessLookupError):
                os.kill(attempts[-1].pid, signal.SIGKILL)
                hit += 1
    tuner.wait()
    return hit


def main(kills: int) -> int:
    """Tune a whole campaign and a killed one and compare them; return the exit status."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = folder / "text"
        text.mkdir()
        for part in range(40):
            lines = [f"{number} plus {part} is {number + part}, and so on.\n" for number in range(60)]
            (text / f"sums-{part:02d}.txt").write_text("".join(lines))
        campaign = loader(text, folder)(SMALL)
        whole = tune(campaign, folder / "whole", workers=2, progress=False)
        print(f"undisturbed: {sum(s.completed for s in whole.studies)} trials completed", flush=True)
        root, script = folder / "killed", folder / "tune.py"
        script.write_text(SCRIPT)
        Tuner(campaign, root, progress=False)
        rng, done = random.Random(11), 0
        while True:
            tuner = subprocess.Popen(
                [sys.executable, str(script), str(folder / "tiny-tuned.toml"), str(root)],
                start_new_session=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            before = len(list((root / "runs").glob("*/attempts.jsonl")))
            while done < kills and tuner.poll() is None:
                # Soon after a run starts to train, so that kills hit runs and not only imports.
                if len(list((root / "runs").glob("*/attempts.jsonl"))) > before or rng.random() < 0.002:
                    time.sleep(rng.uniform(0.0, 1.5))
                    hit = kill_all(tuner, root)
                    done += 1
                    print(f"kill {done}: the tuner and {hit} runs", flush=True)
                    break
                time.sleep(0.05)
            if tuner.poll() is None:
                tuner.wait()
            if tuner.returncode == 0:
                break
        found = Tuner(campaign, root).gather()
        same = trial_outcomes(found) == trial_outcomes(whole)
        again = [
            record.parent.name
            for record in (root / "runs").glob("*/record.json")
            if sum(a.outcome == "finished" for a in RunDirectory(record.parent).attempts()) > 1
        ]
        attempts = sum(
            a.event == "start" for record in (root / "runs").glob("*/record.json")
            for a in RunDirectory(record.parent).attempts()
        )  # fmt: skip
        runs = len(list((root / "runs").glob("*/record.json")))
        print(
            f"{done} kills: {runs} runs in {attempts} attempts, none finished twice: {not again}; same trials: {same}"
        )
        return 0 if same and not again and done >= kills else 1


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 10))
