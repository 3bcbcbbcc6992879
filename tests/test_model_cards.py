"""Model cards say what a run recorded, and nothing else."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from test_examples import load_script
from tiny import tiny_config
from tiny_results import CLASSES, PICTURES, SECRET_FOLDER, run_record, save_result

from green_swin_hf import GreenSwinForImageClassification, publish
from green_swin_hf.publish import collect_files, find_result
from green_swin_hf.run_record import write_record

ROOT = Path(__file__).resolve().parents[1]
KINDS = tuple(PICTURES)


@pytest.fixture(scope="session")
def results(tmp_path_factory):
    """A folder of each kind."""
    parent = tmp_path_factory.mktemp("results")
    return {kind: save_result(kind, parent / kind) for kind in KINDS}


@pytest.fixture
def result(results, tmp_path):
    """Makes a copy of a result with another record."""

    def make(kind, record):
        folder = shutil.copytree(results[kind], tmp_path / kind, dirs_exist_ok=True)
        (folder / "run.json").unlink()
        if record:
            write_record(folder, record)
        return folder

    return make


def card_of(folder, **options):
    content = collect_files(find_result(folder), "someone/tiny", **options)["README.md"]
    return ModelCard(content.decode())


@pytest.mark.parametrize("kind", KINDS)
def test_a_card_says_all_that_was_recorded(results, kind):
    card = card_of(results[kind])
    text, data = card.text, card.data.to_dict()
    figures = ("1,234 images to train on", "56 to validate on", "321 updates of 64 images (2.5 epochs)", "0.000321")
    figures += ("78,901 parameters", "Abacus 9", "3 cores", "5.5 GiB", "12.6 minutes", "torch 9.8.7", "2031-05-06")
    figures += ("0.0123 kWh", "4.56 g of CO₂", "ISL", "an estimate", "0.6543 ± 0.0321", "78 images (test)")
    assert [figure for figure in figures if figure not in text] == []
    assert "epochs: 2.5" in text  # the recipe
    assert "arXiv:2205.13515" in text
    entries = data["model-index"][0]["results"][0]
    assert (entries["metrics"][0]["type"], entries["metrics"][0]["value"]) == ("accuracy", 0.6543)
    assert (entries["dataset"]["name"], entries["dataset"]["split"]) == ("shapes", "test")
    assert data["co2_eq_emissions"]["emissions"] == 4.56
    assert "estimate" in data["co2_eq_emissions"]["source"]
    if kind not in ("pretrained", "backbone"):
        assert all(name in text for name in CLASSES)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_known", [True, False], ids=["recorded", "no record"])
def test_a_card_reads_well(results, result, kind, is_known):
    """Every picture and file that it names is uploaded; nothing of a template shows, no paragraph runs into another."""
    folder = result(kind, run_record(kind) if is_known else None)
    files = collect_files(find_result(folder), "someone/tiny")
    text = files["README.md"].decode()
    assert set(re.findall(r"!\[[^]]+\]\(([^)]+)\)", text)) == set(PICTURES[kind])
    assert set(PICTURES[kind]) <= set(files)
    assert not re.search(r"None|Undefined|[{}]%|\{\{|\}\}|\n\n\n\n", text)
    assert all(line.startswith(("#", "|", "```")) or before == "" or not line.startswith(("## ", "!["))
               for before, line in zip(text.splitlines(), text.splitlines()[1:], strict=False))  # fmt: skip
    blocks = re.findall(r"```(\w*)\n(.*?)```", text, flags=re.DOTALL)
    assert text.count("```") == 2 * len(blocks)
    for language, block in blocks:
        if language == "yaml":
            yaml.safe_load(block)


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_not_recorded_is_absent(result, kind):
    folder = result(kind, None)
    (folder / "recipe.yaml").unlink()
    card = card_of(folder)
    data = card.data.to_dict()
    assert not {"model-index", "co2_eq_emissions", "license", "base_model", "datasets"} & set(data)
    for word in ("## Data", "## Training", "## Results", "## Hardware", "kWh", "CO₂", "Versions", "±", "parameters"):
        assert word not in card.text
    assert "was not recorded" in card.text


def test_an_earlier_start_without_a_record_leaves_the_origin_open(result):
    card = card_of(result("pretrained", run_record("pretrained", starts=[{}, run_record("x")["starts"][0]])))
    assert "random" not in card.text
    assert "Where the weights come from was not recorded" in card.text


PARTLY = {
    "no metric": ({"metrics": []}, "## Results", "## Data"),
    "no data": ({"data": {}}, "## Data", "## Results"),
    "cut off": ({"starts": [{**run_record("x")["starts"][0], "seconds": None}]}, "minutes in all", "Abacus 9"),
    "a start without a record": ({"starts": [{}, run_record("x")["starts"][0]]}, "12.6 minutes", "in 2 starts"),
}


@pytest.mark.parametrize(("changes", "absent", "present"), PARTLY.values(), ids=PARTLY.keys())
def test_a_part_that_is_not_known_is_left_out(result, changes, absent, present):
    changes = json.loads(json.dumps(changes))
    for start in changes.get("starts", []):
        if start.get("seconds", 0) is None:
            del start["seconds"]
    card = card_of(result("classification", run_record("classification", **changes)))
    assert absent not in card.text
    assert present in card.text


def test_settings_that_were_changed_on_the_way_are_said(result):
    settings = {"learning_rate": [0.003, 0.001], "mask_unit_size": [None, 16]}
    changes = [{"after_update": 4000, "settings": settings}]
    card = card_of(result("pretrained", run_record("pretrained", changed_settings=changes)))
    assert "after update 4,000: `learning_rate` from 0.003 to 0.001, `mask_unit_size` from None to 16." in card.text
    assert "All hyper-parameters of the last part" in card.text


def test_time_and_energy_of_several_starts_are_added_up(result):
    start = run_record("x")["starts"][0]
    card = card_of(result("pretrained", run_record("pretrained", starts=[start, start])))
    assert "25.1 minutes in all" in card.text
    assert "0.0246 kWh" in card.text
    assert card.data.to_dict()["co2_eq_emissions"]["emissions"] == 9.12
    without = {name: value for name, value in start.items() if name != "energy"}
    card = card_of(result("pretrained", run_record("pretrained", starts=[start, without])))
    assert "kWh" not in card.text
    assert "co2_eq_emissions" not in card.data.to_dict()


STOCK = {"name": "microsoft/swin-x", "on_hub": True, "base_model": "microsoft/swin-x"}
ORIGINS = {
    "random": ({}, {}, (None, None), "trained from random values"),
    "random, licence given": ({}, {"license": "mit"}, ("mit", None), "Licence of the weights: mit"),
    "stock Swin": ({"start_from": STOCK}, {}, (None, "microsoft/swin-x"), "that of what they derive from holds"),
    "with its licence": ({"start_from": {**STOCK, "license": "mit"}}, {}, ("mit", "microsoft/swin-x"), "weights: mit"),
    "own run": ({"start_from": {"name": "run", "on_hub": False, "is_own": True}}, {}, (None, None), "`run`, which was"),
    "a folder": ({"start_from": {"name": "run", "on_hub": False}}, {}, (None, None), "what they derive from holds"),
    "conversion": (
        {"kind": "conversion", "license": "cc-by-nc-4.0", "start_from": {"name": "x.pth", "on_hub": False}},
        {},
        ("cc-by-nc-4.0", None),
        "Licence of the weights: cc-by-nc-4.0",
    ),
    "conversion of unknown licence": (
        {"kind": "conversion", "start_from": {"name": "x.pth", "on_hub": False}},
        {},
        (None, None),
        "The licence of these weights is not known",
    ),
    "base given": ({"start_from": {"name": "run", "on_hub": False}}, {"base_model": "a/b"}, (None, "a/b"), "[a/b]"),
}


@pytest.mark.parametrize(("record", "given", "expected", "text"), ORIGINS.values(), ids=ORIGINS.keys())
def test_licence_and_origin_are_those_of_the_weights(result, record, given, expected, text):
    card = card_of(result("classification", run_record("classification", **record)), **given)
    data = card.data.to_dict()
    assert (data.get("license"), data.get("base_model")) == expected
    assert text in card.text


@pytest.mark.parametrize(
    ("changes", "is_said"),
    [({}, True), ({"kind": "conversion"}, False), ({"start_from": {"name": "classifier", "on_hub": False}}, False)],
)
def test_only_a_run_from_random_weights_is_said_to_have_learnt_without_labels(result, changes, is_said):
    card = card_of(result("pretrained", run_record("pretrained", **changes)))
    assert ("without labels" in card.text) == is_said


def test_a_data_set_of_the_hub_is_named_as_one(result):
    record = run_record("pretrained", data={"name": "someone/pictures", "on_hub": True})
    assert card_of(result("pretrained", record)).data.to_dict()["datasets"] == ["someone/pictures"]


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_but_results_is_uploaded_and_no_path_of_the_machine(results, kind):
    files = collect_files(find_result(results[kind]), "someone/tiny")
    contents = {name: item if isinstance(item, bytes) else item.read_bytes() for name, item in files.items()}
    assert not {"notes.txt", "checkpoints", "training_state.pt"} & set(files)
    assert all("/" not in name for name in files)
    leaks = [name for name, content in contents.items() if SECRET_FOLDER.encode() in content]
    assert leaks == []
    assert yaml.safe_load(contents["recipe.yaml"])["data"] == "shapes"
    assert {"run.json", "log.jsonl", "recipe.yaml", "model.safetensors"} <= set(files)


def test_a_card_of_ones_own_is_taken_as_it_is(result):
    folder = result("pretrained", None)
    (folder / "README.md").write_text("# Mine\n")
    assert collect_files(find_result(folder), "someone/tiny")["README.md"] == folder / "README.md"


def test_weights_in_shards_are_uploaded_with_their_index(tmp_path):
    GreenSwinForImageClassification(tiny_config()).save_pretrained(tmp_path / "model", max_shard_size="20KB")
    result = find_result(tmp_path / "model")
    assert len(result.weights) > 2
    assert set(result.weights) <= set(collect_files(result, "someone/tiny"))
    (tmp_path / "model" / result.weights[-1]).unlink()
    with pytest.raises(ValueError, match=f"lacks {result.weights[-1]}"):
        find_result(tmp_path / "model")


# Commands of cards


def commands_of(text):
    """The command lines of a card as words, without comments and environment."""
    blocks = re.findall(r"^```bash\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    split = [shlex.split(line, comments=True) for line in lines]
    without = [[word for word in words if not re.match(r"[A-Z_]+=", word)] for words in split]
    return [words for words in without if words]


def parse_command(words):
    """Have the program's own parser read a command; returns program and arguments."""
    if words[:2] == ["accelerate", "launch"]:
        program, *rest = words[2:]
    elif words[:2] == ["python", "-m"]:
        assert words[2] == "green_swin_hf.publish"
        return "publish", publish.parse_arguments(words[3:])
    else:
        python, program, *rest = words
        assert python == "python"
    return program, load_script(ROOT / program).parse_arguments(rest)


@pytest.mark.parametrize("kind", KINDS)
def test_commands_of_a_card_are_read_by_the_programs_own_parsers(results, kind):
    commands = [parse_command(words) for words in commands_of(card_of(results[kind]).text)]
    wanted = {"pretrained": ["examples/finetune.py"], "backbone": ["examples/finetune_detection.py"]}
    assert [program for program, _ in commands] == wanted.get(kind, [])
    for _, arguments in commands:
        assert getattr(arguments, "model", None) == "someone/tiny" or str(arguments.init_from) == "someone/tiny"


VARIANTS = sorted((ROOT / "hub_cards" / "variants").glob("*.md"))


@pytest.mark.parametrize("path", VARIANTS, ids=lambda path: path.stem)
def test_cards_of_variants_are_instructions_whose_commands_parse_and_claim_no_result(path):
    text = path.read_text(encoding="utf-8")
    card = ModelCard(text)
    assert "model-index" not in card.data.to_dict()
    assert "no weights" in text.lower()
    assert not re.search(r"\d\d\.\d ?%|top-1", text)
    commands = [parse_command(words) for words in commands_of(text)]
    assert [program for program, _ in commands] == ["examples/pretrain.py", "examples/finetune.py", "publish"]
    pretrained, finetuned, published = (arguments for _, arguments in commands)
    assert (ROOT / pretrained.recipe).name == f"{path.stem}.yaml"
    assert finetuned.model == str(pretrained.output_dir)
    assert published.folder == finetuned.output_dir
    recipes = [yaml.safe_load((ROOT / arguments.recipe).read_text()) for arguments in (pretrained, finetuned)]
    row = [f"{recipe['epochs']} ({recipe['warmup_epochs']})" for recipe in recipes]
    assert f"| epochs (of them warm-up) | {row[0]} | {row[1]} |" in text
    rates = re.search(
        r"^\| base learning rate \| (\S+) for 256 images \| (\S+) for 512 images", text, flags=re.MULTILINE
    )
    assert [float(rate) for rate in rates.groups()] == [float(recipe["learning_rate"]) for recipe in recipes]
    assert f"window {recipes[0]['window_size']}" in text.splitlines()[6]


def test_every_variant_that_has_a_recipe_has_a_card():
    recipes = (ROOT / "examples" / "recipes" / "pretraining").glob("swin_*.yaml")
    assert [path.stem for path in VARIANTS] == sorted(path.stem for path in recipes)


def test_commands_of_the_space_run(monkeypatch):
    """Those of the Hub's own program as it is, but for the network."""
    from huggingface_hub import HfApi, RepoUrl
    from huggingface_hub.cli.hf import app

    made, uploaded = [], []
    monkeypatch.setattr(
        HfApi, "create_repo", lambda *_, **given: made.append(given) or RepoUrl("https://huggingface.co/spaces/a/b")
    )
    monkeypatch.setattr(HfApi, "upload_folder", lambda *_, **given: uploaded.append(given))
    monkeypatch.chdir(ROOT)
    for words in commands_of((ROOT / "hub_cards" / "space" / "README.md").read_text(encoding="utf-8")):
        if words[0] == "hf":
            app(words[1:], standalone_mode=False)
        elif words[0] == "python":
            assert (ROOT / words[1]).is_file()
        else:
            assert words[:3] == ["pip", "install", "-e"]
            assert words[3] == ".[examples,space]"
    assert made[0]["space_sdk"] == "gradio"
    folders = {given["folder_path"]: given["path_in_repo"] for given in uploaded}
    assert folders == {"hub_cards/space": ".", "green_swin_hf": "green_swin_hf", "examples/data/photos": "photos"}
    assert all(Path(folder).is_dir() for folder in folders)
