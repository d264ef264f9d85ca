"""Campaign files: errors name file, table, field and remedy."""

from __future__ import annotations

import io
import random
import re
import tomllib
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.table import Table
from rich.text import Text
from tiny import arm_table, campaign_head, rung_table

import sweeps
from scaling.console import console
from scaling.errors import CONTROL, UserError
from scaling.spec import RunSpec
from sweeps.config.campaign import built_in, load_campaign
from sweeps.planning.plan import plan
from sweeps.reporting.plan_table import plan_table

GOOD = (
    campaign_head("good", training="tokens_per_parameter = 2", evaluation="").format(text="text")
    + arm_table("adamw", "peak_lr = 1e-2")
    + rung_table("small")
)


def write(folder: Path, text: str) -> Path:
    (folder / "text").mkdir(exist_ok=True)
    (folder / "text" / "a.txt").write_text("words " * 2000)
    path = folder / "good.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", built_in())
def test_a_built_in_campaign_can_be_planned(name: str, tmp_path: Path) -> None:
    assert plan(load_campaign(name), tmp_path).runs


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("layers = 1", "layerz = 1"), ['[[rungs]] number 1 ("small")', "layerz", 'did you mean "layers"']),
        (("[training]", "[trainign]"), ['"trainign"', 'did you mean "training"']),
        (("tokens_per_parameter = 2", "tokens_per_parameter = 'two'"), ["[training]", "tokens_per_parameter", "'two'"]),
        (("width = 16", "width = 16\ntokens = 1e9"), ["small", "tokens", "1000000000.0", "1_000_000_000"]),
        (("heads = 2", "heads = 3"), ['rung "small"', "width 16", "heads 3", "Use 2 heads"]),
        (("heads = 2", ""), ['"heads" is missing', "[[rungs]] number 1"]),
        (('optimizer = "adamw"', 'optimizer = "adamww"'), ['arm "adamw"', "adamww", 'did you mean "adamw"']),
        (("peak_lr = 1e-2", "peak_lr = 1e-2\noptions = { beta3 = 0.9 }"), ["beta3", "beta1, beta2, epsilon"]),
        (("peak_lr = 1e-2", "peak_lr = -1.0"), ['[[arms]] number 1 ("adamw")', "peak_lr", "-1.0"]),
        (("peak_lr = 1e-2", "peak_lr = { smal = 1e-2 }"), ["smal", 'did you mean "small"']),
        (("peak_lr = 1e-2", ""), ['arm "adamw"', "no peak_lr"]),
        (("peak_lr = 1e-2", 'rule = "moonlite"'), ["moonlite", 'did you mean "moonlight"']),
        (("batch_tokens = 128", "batch_tokens = 100"), ["batch_tokens 100", "context 16", "use 96"]),
        (("batch_tokens = 128", ""), ['rung "small"', "no batch_tokens"]),
        (("tokens_per_parameter = 2", ""), ['rung "small"', "training tokens is missing"]),
        (('path = "text"', 'path = "txt"'), ["txt", "[data]"]),
        (("tokens = 512", "tokens = 700"), ["[evaluation]", "700", "will hold at most 603"]),
        (("tokens = 512", "tokens = 8"), ["[evaluation]", "tokens is 8", "one sequence of context 16"]),
        (('source = "text"', 'source = "txt"'), ["[data]", "txt", 'did you mean "text"']),
        (('name = "good"', 'name = "../../etc"'), ["name", "../../etc", "letters"]),
        (('name = "small"', 'name = "a/b"'), ["[[rungs]] number 1", "a/b"]),
        (('name = "good"', 'name = "good\\n"'), ["name", "letters"]),
        (("[[rungs]]", '[placement]\ndevise = "cpu"\n[[rungs]]'), ["[placement]", "devise", 'did you mean "device"']),
        (("[[rungs]]", '[placement]\ndevice = "tpu"\n[[rungs]]'), ["[placement]", "device", "tpu"]),
        (("[[rungs]]", "[placement.rungs.smell]\nthreads = 2\n[[rungs]]"), ["smell", 'did you mean "small"']),
        (("peak_lr = 1e-2", "peak_lr = { small = 'x' }"), ["adamw", "peak_lr", "small is 'x'"]),
        (("[[rungs]]", '[placement]\ndata = "nowhere"\n[[rungs]]'), ["data", "nowhere", "prepared token shards"]),
        (("[evaluation]", '[schedule]\nkind = "wsd"\n[evaluation]'), ["wsd", "decay"]),
        (('name = "good"', 'name = "good"\nhyperparameters = "rule"'), ["rule", 'rule = "moonlight"']),
        (('name = "good"', 'name = "good"\nseeds = []'), ["seeds"]),
        (('name = "good"', "name = good"), ["not valid TOML", "line 2"]),
    ],
    ids=lambda value: value[1].strip().replace("\n", " ")[:40] if isinstance(value, tuple) else "",
)
def test_a_wrong_campaign_names_place_and_remedy(change: tuple[str, str], said: list[str], tmp_path: Path) -> None:
    assert change[0] in GOOD
    path = write(tmp_path, GOOD.replace(*change, 1))
    with pytest.raises(UserError) as refused:
        plan(load_campaign(path), tmp_path / "root")
    sentence = str(refused.value)
    missing = [word for word in ("good.toml", *said) if word not in sentence]
    assert not missing, sentence


def test_the_unchanged_campaign_is_not_refused(tmp_path: Path) -> None:
    assert len(plan(load_campaign(write(tmp_path, GOOD)), tmp_path / "root").runs) == 1


def test_an_unknown_campaign_names_the_known_ones() -> None:
    with pytest.raises(UserError, match='did you mean "moonlight"'):
        load_campaign("monlight")


def test_built_in_files_can_be_copied(tmp_path: Path) -> None:
    for name in built_in():
        source = Path(sweeps.__file__).parent / "campaigns" / f"{name}.toml"
        copy = tmp_path / source.name
        copy.write_bytes(source.read_bytes())
        assert tomllib.loads(copy.read_text())["name"] == name
        assert load_campaign(copy).rungs == load_campaign(name).rungs


def test_problems_of_a_file_are_reported_together(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD.replace("heads = 2", "headz = 2\nwidht = 3").replace("context = 16", "context = -1"))
    with pytest.raises(UserError) as refused:
        load_campaign(path)
    lines = str(refused.value).splitlines()
    assert len(lines) == 4
    assert all(
        any(word in line for line in lines) for word in ("headz", "widht", "context is -1", '"heads" is missing')
    )


@pytest.mark.parametrize("table", ["[placement]", "[[rungs]]"])
def test_a_misplaced_top_level_key_is_located(table: str, tmp_path: Path) -> None:
    text = GOOD + ("[placement]\nseeds = [0]\n" if table == "[placement]" else "seeds = [0]\nrule = 'chinchilla'\n")
    with pytest.raises(UserError, match="belongs at the top of the file"):
        plan(load_campaign(write(tmp_path, text)), tmp_path / "root")


def test_too_many_runs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sweeps.planning.plan.MAX_RUNS", 15)
    with pytest.raises(UserError, match="make 16 runs; a campaign has at most 15"):
        plan(load_campaign("quick"), tmp_path)


def test_a_byte_order_mark_is_accepted(tmp_path: Path) -> None:
    assert load_campaign(write(tmp_path, "\ufeff" + GOOD)).name == "good"


@pytest.mark.parametrize(
    "setting",
    [
        *("training.weight_decay=inf", "arms=nan", f"seeds={'9' * 4400}", f"seeds=[{2**64}]", "seeds=[-1]"),
        *("training.tokens_per_parameter=1e29", f"evaluation.times={10**10}", "model.context=2147483648"),
        *(
            "placement.threads=100000",
            "placement.slurm.max_parallel=2147483648",
            f"placement.slurm.time_minutes={10**30}",
        ),
        *(f"x{'.x' * 3000}=1", f"model={{{'x.' * 3000}x = 1}}", 'data.tokenizer="/dev/zero"', 'title="\\u001b"'),
        *(f'data.name="{"a" * 900}"', 'data.path="~no.such.user/x"'),
    ],
    ids=lambda setting: setting[:30],
)
def test_absurd_values_give_short_errors(setting: str, tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    if "name" in setting:
        path.write_text(path.read_text().replace('source = "text"', 'source = "hf"').replace('path = "text"', ""))
    with pytest.raises(UserError) as refused:
        plan(load_campaign(path, settings=[setting]), tmp_path / "root")
    assert len(str(refused.value)) < 1000


def test_console_escapes_markup_and_control_characters(tmp_path: Path) -> None:
    shown = io.StringIO()
    table = Table(title="[/bold] x")
    table.add_column("a\x1b]0;owned\x07")
    table.add_row(":smile: [red]b\x9b2J")
    console(file=shown, width=60).print(table, "[/x]", Text("c\x00"))
    assert not CONTROL.search(shown.getvalue())
    assert all(text in shown.getvalue() for text in ("[/bold] x", "a␛]0;owned", ":smile: [red]b", "[/x]", "c␀"))


@pytest.mark.parametrize(("multiple", "said"), [(8, False), (256, True)])
def test_plan_warns_of_widened_feed_forward(multiple: int, said: bool, tmp_path: Path) -> None:
    shown = io.StringIO()
    planned = plan(load_campaign("quick", settings=[f"model.ffn_multiple={multiple}"]), tmp_path)
    console(file=shown, width=400).print(plan_table(planned))
    assert ("21k (64 to 256), 38k (85 to 256)" in shown.getvalue()) == said
    assert ("Use ffn_multiple = 16" in shown.getvalue()) == said


NUMBERS = (
    *(
        "inf",
        "-inf",
        "nan",
        "1e308",
        "1e30",
        "1e-320",
        "0",
        "-1",
        "0.0",
        "0.5",
        "1.0",
        "1.5",
        "1",
        "2",
        "3",
        "7",
        "128",
    ),
    *(str(10**power) for power in (4, 6, 12, 15, 18, 30, 309)),
    *(str(number) for number in (2**12, 2**20, 2**31, 2**32, 2**63 - 1, 2**64, 3_000_000_000_000)),
    "9" * 4301,
    "0x" + "f" * 5000,
)
OTHERS = (
    *(
        '""',
        '"[/x]"',
        '"[bold"',
        r'"\u001b[2J"',
        r'"\u0000"',
        '"~no.such.user/x"',
        '"../../x"',
        '"$x$"',
        '"a b"',
        '"cuda"',
    ),
    f'"{"a" * 5000}"',
    f'"{"a" * 300}/x.toml"',
    *("[]", "[0]", "[-1, 1]", '["x"]', "{}", "{ a = 1 }", "{ a = { b = { c = [[{}]] } } }", "[" * 300 + "]" * 300),
    f"{{ {'a.' * 5000}a = 1 }}",
    *("true", "1979-05-27", "not toml"),
)

KEYS = (
    "seeds",
    "rungs",
    "ffn",
    "slurm.gpus_per_node",
    "placement.threads",
    "tokens",
    "mixture",
    "latent",
    "a" * 2000,
    r'"\u001b"',
)


def mutated(text: str, draw: random.Random) -> str:
    """A campaign file with some lines changed."""
    lines = text.splitlines()
    for _ in range(draw.choice((1, 1, 2, 3))):
        kind = draw.choice((r"\w", r"\w", r"\w", r"\w", r"\["))
        place = draw.choice([number for number, line in enumerate(lines) if re.match(kind, line)] or [0])
        key, equals, value = lines[place].partition("=")
        change = draw.choice(("value",) * 15 + ("key",) + ("delete", "double", "nest"))
        if change == "value" and equals:
            number = value.strip()[:1].isdigit() and draw.random() < 0.8
            lines[place] = f"{key}= {draw.choice(NUMBERS if number else NUMBERS + OTHERS)}"
        elif change == "key" and equals:
            lines[place] = f"{draw.choice(KEYS)} = {value}"
        elif change == "nest":
            lines[place] = f"x.{lines[place]}"
        elif not equals or change == "delete":
            lines[place : place + 1] = [lines[place]] * draw.choice((0, 2))
        else:
            lines.append(lines[place])
    return "\n".join(lines)


@pytest.mark.parametrize("name", built_in())
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(draw=st.randoms(use_true_random=False))
def test_a_mutated_campaign_is_planned_or_refused(name: str, draw: random.Random, tmp_path: Path) -> None:
    file = tmp_path / "mutated.toml"
    source = Path(sweeps.__file__).parent / "campaigns" / f"{name}.toml"
    file.write_text(mutated(source.read_text(), draw))
    planned, sentence = None, ""
    try:
        planned = plan(load_campaign(file), tmp_path / "root")
        console(file=io.StringIO()).print(plan_table(planned))
    except UserError as error:
        sentence = str(error)
    assert bool(sentence) or planned is not None
    assert len(sentence) < 4000
    assert not CONTROL.search(sentence)
    specs = [run.spec for run in planned.runs] if planned is not None else []
    assert [msgspec.json.decode(msgspec.json.encode(spec), type=RunSpec) for spec in specs] == specs
