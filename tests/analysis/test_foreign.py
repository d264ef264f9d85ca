"""Tables as other tools export them: each fits with at most one --map, and gives the ratio that was planted in it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from synthetic import ADAMW, MUON, ladder

from analysis.data.foreign import TableError
from analysis.data.table import RunsTable, read_table
from analysis.ratio.study import fit_table
from scaling.cli import main

TRUTH = (MUON.scale / ADAMW.scale) ** (1 / MUON.exponent)
"""The match ratio of the two laws of every table here, whose exponents are equal."""


@pytest.fixture
def runs() -> pd.DataFrame:
    """Ten runs: whole counts, a batch of 2**19 tokens."""
    frame = ladder({"adamw": ADAMW, "muon": MUON}, smallest=3e18)
    frame["steps"] = np.round(frame["tokens"] / 2**19)
    frame["tokens"] = frame["steps"] * 2**19
    frame["params"] = np.round(frame["params"])
    frame["flops"] = 6.0 * frame["params"] * frame["tokens"]
    laws = frame["arm"].map({"adamw": ADAMW, "muon": MUON})
    return frame.assign(loss=[law.loss(flops / 8.64e19) for law, flops in zip(laws, frame["flops"], strict=True)])


def wandb_table(runs: pd.DataFrame, folder: Path) -> tuple[Path, dict[str, str], str | None]:
    """A project's table of runs as CSV: display columns, then the configuration with dots, then the summary.

    Columns: docs.wandb.ai, "Export table data" and "Runs table" (Name, State, Runtime); the key of the loss is Lightning's.
    """
    table = pd.DataFrame({"Name": [f"sunny-sky-{row}" for row in range(10)], "State": "finished", "Notes": ""})
    table["Tags"], table["Runtime"] = "", 3600
    table["model.n_params"], table["optimizer.name"], table["seq_len"] = runs["params"], runs["arm"], 1024
    table["batch_size"], table["lr"], table["_step"], table["val/loss"] = 512, 1e-3, runs["steps"], runs["loss"]
    crashed = table.iloc[[0]].assign(State="crashed", **{"val/loss": np.nan})
    pd.concat([table, crashed]).to_csv(folder / "wandb_export.csv", index=False)
    return folder / "wandb_export.csv", {"params": "model.n_params"}, None


def marin_tables(runs: pd.DataFrame, folder: Path) -> tuple[Path, dict[str, str], str | None]:
    """A tracker_metrics.jsonl for each optimizer, with the keys that Levanter logs.

    Keys: github.com/marin-community/marin, tests of `transform_metrics_for_isoflop` and experiments/grug/README.md
    ("Logged metrics"): run_path, config, summary with throughput/total_tokens, throughput/total_gflops, parameter_count.
    Its FLOPs count attention and head, here as 15 % more than 6ND.
    """
    for arm, rows in runs.groupby("arm"):
        lines = [
            {
                "run_path": f"gs://marin/checkpoints/isoflop-{row.flops:.0e}-{arm}",
                "config": {"model": {"hidden_dim": 512, "num_layers": 6}, "trainer": {"train_batch_size": 512}},
                "summary": {
                    "throughput/total_tokens": row.tokens,
                    "throughput/total_gflops": 1.15 * row.flops / 1e9,
                    "eval/paloma/c4_en/bpb": row.loss,
                    "parameter_count": row.params,
                },
            }
            for row in rows.itertuples()
        ]
        (folder / f"{arm}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder, {"loss": "eval/paloma/c4_en/bpb"}, None


def olmo_histories(runs: pd.DataFrame, folder: Path) -> tuple[Path, dict[str, str], str | None]:
    """The history of each run as a CSV, in a folder for each optimizer, without parameters.

    Columns: github.com/allenai/OLMo-ladder, src/scaling/download_wandb_logs.py, and the files under src/scripts/other/data.
    """
    for row in runs.itertuples():
        share = np.linspace(0.1, 1.0, 10)
        history = pd.DataFrame({"_step": np.round(share * row.steps)})
        for name in ("c4_en", "dolma_books", "pile"):
            # Before the learning rate has decayed, the loss is higher than the law's.
            history[f"eval/{name}-validation/CrossEntropyLoss"] = row.loss * (1.5 - 0.5 * share)
        history["throughput/total_tokens"] = share * row.tokens
        history["throughput/total_training_Gflops"] = share * row.flops / 1e9
        history["optim/learning_rate_group0"] = 1e-3 * (1 - share)
        history["learning_rate_peak"], history["batch_size_in_tokens"] = 9.7e-4, 2**19
        (folder / row.arm).mkdir(exist_ok=True)
        history.to_csv(folder / row.arm / f"190M-{row.Index}xC.csv", index=False)
    return folder, {"loss": "eval/c4_en-validation/CrossEntropyLoss"}, "file"


def nanochat_results(runs: pd.DataFrame, folder: Path) -> tuple[Path, dict[str, str], str | None]:
    """The results.csv of a sweep for each optimizer.

    Columns: github.com/karpathy/nanochat, runs/scaling_laws.sh of early 2026.
    """
    for arm, rows in runs.groupby("arm"):
        table = pd.DataFrame(
            {"flops_budget": [f"{flops:.15g}" for flops in rows["flops"]], "depth": 8, "model_dim": 512}
        )
        table["num_params"], table["num_scaling_params"] = 2 * rows["params"].to_numpy(), rows["params"].to_numpy()
        table["num_iterations"], table["tokens_trained"] = rows["steps"].to_numpy(), rows["tokens"].to_numpy()
        table["param_data_ratio"], table["val_bpb"] = 20, rows["loss"].to_numpy()
        table["core_score"], table["train_time_sec"] = 0.1, 100
        table.to_csv(folder / f"{arm}.csv.gz", index=False)
    return folder, {}, None


def hand_made_sheet(runs: pd.DataFrame, folder: Path) -> tuple[Path, dict[str, str], str | None]:
    """A sheet that a person typed: capitals, suffixes, thousands separators, no FLOPs."""
    sheet = pd.DataFrame({"Optimizer": runs["arm"], "N": [f"{params / 1e6:.6f}M" for params in runs["params"]]})
    sheet["Tokens"] = [
        f"{tokens:,.0f}" if row % 2 else f"{tokens / 1e9:.9f} B" for row, tokens in enumerate(runs["tokens"])
    ]
    sheet["Val Loss"] = runs["loss"]
    sheet.to_csv(folder / "sheet.tsv", sep="\t", index=False)
    return folder / "sheet.tsv", {}, None


Export = Callable[[pd.DataFrame, Path], tuple[Path, dict[str, str], str | None]]
EXPORTS: list[Export] = [wandb_table, marin_tables, olmo_histories, nanochat_results, hand_made_sheet]
ASSUMED = {
    wandb_table: [
        "arm is optimizer.name",
        "loss is val/loss",
        "batch_tokens = batch_size * seq_len",
        "flops = 6 * params",
    ],
    marin_tables: [
        "flops is throughput/total_gflops in GFLOPs",
        "loss is eval/paloma/c4_en/bpb in bits",
        "arm is the file",
    ],
    olmo_histories: [
        "100 rows are reduced to the last of 10 runs",
        "params = flops / (6 * tokens)",
        "arm is the folder",
    ],
    nanochat_results: ["params is num_scaling_params", "flops is flops_budget", "loss is val_bpb in bits per byte"],
    hand_made_sheet: ["arm is Optimizer", "params is N", "loss is Val Loss", "flops = 6 * params * tokens"],
}


def read(export: Export, runs: pd.DataFrame, folder: Path) -> RunsTable:
    path, names, last = export(runs, folder)
    assert len(names) <= 1
    return read_table(path, names=names, last=last)


@pytest.mark.parametrize("export", EXPORTS)
def test_an_export_gives_the_planted_ratio(export: Export, runs: pd.DataFrame, tmp_path: Path) -> None:
    table = read(export, runs, tmp_path)
    (comparison,) = fit_table(table, extrapolate=True).comparisons
    assert comparison.headline.ratio == pytest.approx(TRUTH, rel=1e-3)
    used = table.frame[table.frame["left_out"] == ""]
    assert sorted(used["tokens"]) == pytest.approx(sorted(runs["tokens"]))
    assert sorted(used["params"]) == pytest.approx(sorted(runs["params"]))
    assert [words for words in ASSUMED[export] if words not in table.assumed] == []


def test_the_command_line_says_what_it_assumed(
    runs: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, names, last = olmo_histories(runs, tmp_path)
    words = ["scaling", "fit", str(path), "--last", str(last), "--json"]
    words += [word for column, name in names.items() for word in ("--map", f"{column}={name}")]
    monkeypatch.setattr("sys.argv", words)
    main()
    out, err = capsys.readouterr()
    assert json.loads(out)["comparisons"][0]["headline"]["ratio"] == pytest.approx(TRUTH, rel=1e-3)
    assert err.count("\n") == 1
    assert f"{path}: loss is eval/c4_en-validation/CrossEntropyLoss; " in err or "arm is the folder" in err


@pytest.mark.parametrize("suffix", ["csv.gz", "jsonl", "jsonl.gz", "json", "parquet"])
def test_every_format_gives_the_same_rows(runs: pd.DataFrame, tmp_path: Path, suffix: str) -> None:
    path, runs = tmp_path / f"runs.{suffix}", runs.drop(columns="steps")
    if suffix == "parquet":
        runs.to_parquet(path)
    elif suffix.startswith("json"):
        runs.to_json(path, orient="records", lines=suffix != "json", double_precision=15)
    else:
        runs.to_csv(path, index=False)
    table = read_table(path)
    assert table.assumed == ""
    assert fit_table(table, extrapolate=True).comparisons[0].headline.ratio == pytest.approx(TRUTH, rel=1e-3)


@pytest.mark.parametrize("table", sorted(Path("results").glob("*/runs.csv")), ids=lambda path: path.parent.name)
def test_own_tables_are_read_as_they_are(table: Path) -> None:
    found = read_table(table)
    assert found.assumed == ""
    assert list(found.frame.columns[:-1]) == list(pd.read_csv(table).columns)


REFUSED = {
    "no such column": ({"names": {"loss": "val/los"}}, '--map loss=val/los names column "val/los".*near it: val/loss'),
    "no such run": ({"last": "run_id"}, '--last run_id names column "run_id"'),
    "training loss": ({}, r"column loss is missing.*--map loss=COLUMN"),
}


@pytest.mark.parametrize(("options", "sentence"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_not_there_is_a_sentence(
    runs: pd.DataFrame, tmp_path: Path, options: dict[str, dict[str, str]], sentence: str
) -> None:
    name = "train/loss" if not options else "val/loss"
    runs.rename(columns={"loss": name}).to_csv(tmp_path / "runs.csv", index=False)
    with pytest.raises(TableError, match=sentence):
        read_table(tmp_path / "runs.csv", **options)  # type: ignore[arg-type]


def test_an_empty_folder_and_a_wrong_map_are_sentences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "runs.csv").write_text("arm,params\n")
    for words in (["empty"], ["runs.csv", "--map", "loss"]):
        monkeypatch.setattr("sys.argv", ["scaling", "fit", str(tmp_path / words[0]), *words[1:]])
        with pytest.raises(SystemExit, match="2"):
            main()
    message = capsys.readouterr().err
    assert "the folder holds no table" in message
    assert "--map loss: write COLUMN=NAME" in message


def test_the_last_row_carries_counts_that_were_logged_before(tmp_path: Path) -> None:
    """W&B's history has one row for each call of log, so a loss may stand in a row without tokens."""
    rows = [{"run": "a", "_step": 1, "tokens": 1e9}, {"run": "a", "_step": 1, "loss": 3.0}]
    rows += [{"run": "a", "_step": 2, "tokens": 2e9}, {"run": "a", "_step": 2, "loss": 2.5}, {"run": "a", "_step": 3}]
    pd.DataFrame(rows).assign(arm="x", params=1e8).to_csv(tmp_path / "history.csv", index=False)
    frame = read_table(tmp_path / "history.csv", last="run").frame
    assert frame[["tokens", "loss"]].to_numpy().tolist() == [[2e9, 2.5]]


def test_labels_with_suffixes_are_held_against_the_flops(runs: pd.DataFrame, tmp_path: Path) -> None:
    labels = runs.assign(params=[f"{params / 1e9:.1f}B" for params in runs["params"]])
    labels.to_csv(tmp_path / "runs.csv", index=False)
    with pytest.raises(TableError, match="Where params is a label"):
        read_table(tmp_path / "runs.csv", convention="6nd")
