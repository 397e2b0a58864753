"""The pages in docs/: every command in them is run here, at toy size, and every key that they name exists."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from sipo.cache.savings import FULL_SIZE
from sipo.data.readers import JsonlReader
from sipo.families import FAMILIES, get_family
from sipo.families.lora_files import FORMATS, formats_of
from sipo.recipe.config import ConfigError, from_dict
from sipo.training import TrainingConfig
from sipo.training.optimization import rate_factor
from tests.docs_pages import (
    OTHERS,
    PAGES,
    ROOT,
    blocks,
    commands,
    flat,
    make_workspace,
    page_text,
    prose,
    run_launch,
    run_python,
    run_sipo,
    smaller_words,
    spans,
    unnumbered,
)
from tests.test_label import clip_folder

__all__ = ["clip_folder"]  # a fixture: a CLIP model of random weights

# What the scripts of docs/moving.md take, at the commits that it names: both, the first alone, the second alone, of
# which there is one for SD and one for SDXL.
FLAGS = {
    "a b": """
    adam_beta1 adam_beta2 adam_epsilon adam_weight_decay allow_tf32 beta_dpo cache_dir checkpointing_steps
    dataloader_num_workers dataset_name gradient_accumulation_steps gradient_checkpointing hub_model_id learning_rate
    local_rank logging_dir lr_scheduler lr_warmup_steps max_grad_norm max_train_samples max_train_steps mixed_precision
    no_hflip num_train_epochs output_dir pretrained_model_name_or_path random_crop report_to resolution
    resume_from_checkpoint revision scale_lr seed train_batch_size
    """,
    "a b (SDXL)": "pretrained_vae_model_name_or_path",
    "a": """
    caption_column choice_model dataset_config_name dreamlike_pairs_only hard_skip_resume image_column
    input_perturbation noise_offset proportion_empty_prompts sdxl sft split tracker_project_name train_data_dir
    unet_init use_adafactor
    """,
    "b": """
    checkpoints_total_limit dataset_split_name enable_xformers_memory_efficient_attention hub_token
    lr_num_cycles lr_power prior_generation_precision push_to_hub rank run_validation tracker_name use_8bit_adam
    vae_encode_batch_size validation_steps variant
    """,
    "b (SD)": "loss_type",
    "b (SDXL)": "is_turbo",
}

# A configuration with nothing in it that has a default.
LEAST: dict[str, Any] = {
    "model": {"family": "sd15", "pretrained_model_name_or_path": "p"},
    "data": {"dataset_name": "p", "cache": "c"},
    "training": {"max_train_steps": 1, "output_dir": "o"},
}


# ---- What pages may say ----


def known_keys() -> set[str]:
    return set(flat(from_dict(LEAST).as_dict(), sections=True))


@pytest.mark.parametrize("page", [*PAGES, "README"])
def test_every_block_is_of_a_kind_that_is_run_or_read(page: str) -> None:
    previous = ""
    for block in blocks(page):
        where = f"{page}.md:{block.line}"
        assert block.language in ("sh", "python", "yaml", "json", "text"), where
        if block.language == "text":
            assert previous in ("sh", "python"), f"{where}: the output of no block"
        previous = block.language
    assert page_text(page).count("\n```") == 2 * len(blocks(page)), f"{page}.md: a fence that nothing closes"
    hidden = re.search(r"^(~~~|[ \t$>]+(sipo|accelerate|python|pip) ).*$", prose(page), re.M)
    assert hidden is None, f"{page}.md: {hidden[0] if hidden else ''!r} is in no block that is run"


def test_every_page_is_once_in_the_index_and_short() -> None:
    listed = re.findall(r"^- \[[^]]*\]\((\w[\w-]*)\.md\)", page_text("README"), re.M)
    assert sorted([*listed, "README"]) == sorted([*PAGES, *OTHERS])
    for page in PAGES:
        assert 50 <= len(page_text(page).splitlines()) <= 170, page
        assert max(map(len, prose(page).splitlines())) <= 400, page


@pytest.mark.parametrize("page", [*PAGES, *OTHERS, "../README"])
def test_every_key_that_is_named_exists(page: str) -> None:
    known = known_keys()
    # No files (loss.py), calls (loss.backward()) or modules (sipo.training).
    key_like = r"(?<![\w./])(?:model|data|training|loss|samples)\.(?!py\b)[a-z]\w*(?:\.\w+)*(?![\w(])"
    named = [key for span in spans(page) for key in re.findall(key_like, span)]
    assert page in OTHERS or named
    for key in named:
        assert key in known, f"{page}.md names {key}"


@pytest.mark.parametrize("page", PAGES)
def test_yaml_and_json_are_what_they_are_for(page: str, tmp_path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    options = {action.dest for action in launch_command_parser()._actions}
    for block in blocks(page):
        if block.language == "json":
            path = tmp_path / "pairs.jsonl"
            lines = [json.loads(line) for line in block.text.splitlines()]
            path.write_text("".join(json.dumps(line) + "\n" for line in lines if "candidates" not in line))
            assert all(not record.problem for record in JsonlReader(path))
            assert all(len(line.get("candidates", "ab")) >= 2 and line["prompt"] for line in lines)
        elif block.language == "yaml" and block.file:
            path = tmp_path / block.file
            path.write_text(block.text)
            read = load_config_from_file(str(path))  # unknown keys are errors
            for key in read.fsdp_config or {}:
                assert key in options, f"{page}.md:{block.line}: accelerate has no {key}"
        elif block.language == "yaml":
            assert set(flat(yaml.safe_load(block.text))) <= known_keys(), f"{page}.md:{block.line}"


def test_every_message_that_is_quoted_is_one_of_ours() -> None:
    """A message stands between backticks and has "expected" or "…" in it; "…" is for what differs."""
    source = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "sipo").rglob("*.py")))
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # one literal in several lines
    pieces = [
        (page, piece.strip())
        for page in PAGES
        for span in spans(page)
        if "…" in span or re.search(r"\bexpected\b", span)
        for piece in re.split("…", span)
        if len(piece.strip()) > 2
    ]
    assert len(pieces) > 40
    assert not [(page, piece) for page, piece in pieces if piece not in source]


def test_the_format_of_pairs_stands_in_one_page_that_the_guides_link() -> None:
    with_pairs = {page for page in PAGES for b in blocks(page) if b.language == "json" and '"chosen"' in b.text}
    assert with_pairs == {"jsonl"}
    for page in ("sdxl-pickapic", "wan-clips", "moving"):
        assert "(jsonl.md)" in page_text(page), page
    assert "(docs/jsonl.md)" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_nothing_names_a_data_set_that_the_hub_no_longer_has() -> None:
    """Pick-a-Pic's own repositories have been gone since 2025."""
    for path in (ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*.yaml")):
        assert "yuvalkirstain/pickapic" not in path.read_text(encoding="utf-8"), path.name


def test_commands_in_the_text_are_among_those_that_are_run() -> None:
    run = [
        " ".join(command.words) for page in PAGES for b in blocks(page) if b.language == "sh" for command in commands(b)
    ]
    for page in [*PAGES, "README"]:
        for span in spans(page):
            if span.startswith(("sipo ", "accelerate launch")):
                assert any(command.startswith(span) for command in run), f"{page}.md: {span}"


def test_every_flag_of_the_scripts_has_its_row_or_is_a_key() -> None:
    """A flag with the name of a key has a row only where there is more to say than that key."""
    names_of_keys = {key.rpartition(".")[2] for key in known_keys()}
    found: dict[str, str] = {}
    for line in page_text("moving").splitlines():
        if line.startswith("| `--"):
            flags, scripts, here = (cell.strip() for cell in line.split("|")[1:4])
            names = re.findall(r"`--(\w+)`", flags)
            where = [script.strip() for script in scripts.split(",")]
            where = where * len(names) if len(where) == 1 else where
            found |= dict(zip(names, where, strict=True))
            assert not re.fullmatch(rf"`\w+\.({'|'.join(names)})`", here), f"{flags}: the same name, so it needs no row"
    of_scripts = {flag: scripts for scripts, flags in FLAGS.items() for flag in flags.split()}
    without = of_scripts.keys() - found.keys()
    assert without <= names_of_keys, without - names_of_keys
    assert found == {flag: scripts for flag, scripts in of_scripts.items() if flag not in without}
    assert len(without) == 21
    for named in re.findall(r"`--(\w+)` is\s+`\w+\.(\w+)`", page_text("moving")):
        assert named[0] == named[1] and named[0] in without


def test_flags_whose_row_names_a_key_lead_to_it() -> None:
    """The error for a flag in place of a key names what the flag's row does."""
    known = known_keys()
    names, led = {key.rpartition(".")[2] for key in known}, []
    for line in page_text("moving").splitlines():
        if line.startswith("| `--"):
            flags, _, here = line.split("|")[1:4]
            spans_of_row = {span.partition(":")[0] for span in re.findall(r"`([^`]+)`", here)}
            named = spans_of_row & (known | {"HF_DATASETS_CACHE", "sipo label", "--resume"})
            for flag in re.findall(r"`--(\w+)`", flags) if named else ():
                if flag not in names:
                    with pytest.raises(ConfigError) as caught:
                        from_dict(LEAST | {flag: 1})
                    assert any(key in str(caught.value) for key in named), caught.value
                    led.append(flag)
    assert len(led) == 19


def row_of(flag: str) -> str:
    """A row of docs/moving.md."""
    return next(line for line in page_text("moving").splitlines() if line.startswith(f"| `--{flag}`"))


def test_defaults_beside_the_scripts_are_ours() -> None:
    defaults = flat(from_dict(LEAST).as_dict())
    lines = page_text("moving").partition("## Defaults")[2].splitlines()
    cells = [line.split("|") for line in lines if re.match(r"\| `(data|model|training)", line)]
    rows = {cell[1]: cell[4].strip() for cell in cells}
    assert len(rows) == 12
    for cell in cells:
        theirs = [value.strip() for value in cell[2:4]]
        assert theirs != [cell[4].strip()] * 2, f"{cell[1]}: no difference, so it needs no row"
    for named, ours in rows.items():
        key = re.findall(r"`([a-z_.]+)`", named)[0]
        if key == "data.sizes":
            assert defaults[key] == [[int(ours)] * 2]
        elif key == "training.max_train_steps":
            assert ours == "must be given"
        elif isinstance(defaults[key], str):
            assert defaults[key] == ours, key
        else:
            assert defaults[key] == float({"true": 1, "false": 0}.get(ours, ours)), key


@pytest.mark.parametrize("name", ["constant", "constant_with_warmup", "linear", "cosine", "polynomial"])
def test_learning_rates_of_diffusers_schedulers_are_those_of_the_page(name: str) -> None:
    """The page's row of ``--lr_scheduler``, and that of ``--lr_warmup_steps``."""
    from diffusers.optimization import get_scheduler

    steps, warmup, peak = 20, 5, 1e-3
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    theirs = []
    for _ in range(steps):
        theirs.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    schedule: Any = {"polynomial": "linear"}.get(name, name)
    config = TrainingConfig(steps, "o", lr_warmup_steps=0 if name == "constant" else warmup, lr_scheduler=schedule)
    ours = [peak * rate_factor(config, step) for step in range(steps)]
    if name != "constant":
        assert theirs[0] == 0 and ours[0] == pytest.approx(peak / warmup)
        # While it rises, ours is a step ahead.
        theirs[:warmup], ours[:warmup] = theirs[1:warmup], ours[: warmup - 1]
    assert ours == pytest.approx(theirs, rel=1e-9, abs=1.01e-7 if name == "polynomial" else 0)
    assert f"`{name}`" in row_of("lr_scheduler")
    if name == "constant":
        assert "`training.lr_warmup_steps` must be 0" in row_of("lr_warmup_steps")


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo"])
def test_other_losses_of_the_sd_script_are_those_of_the_page(loss_type: str) -> None:
    from sipo import NoiseSchedule, SIPOLoss, convert_beta

    beta_dpo = 3.0
    generator = torch.Generator().manual_seed(0)
    model, ref, target = (torch.randn(6, 4, 5, 5, generator=generator) for _ in range(3))
    model = 1.5 * model
    model.requires_grad_()
    model_w, model_l = (model - target).square().mean((1, 2, 3)).chunk(2)
    ref_w, ref_l = (ref - target).square().mean((1, 2, 3)).chunk(2)
    logits = (ref_w - ref_l) - (model_w - model_l)
    theirs = {
        "sigmoid": -torch.nn.functional.logsigmoid(beta_dpo * logits),
        "hinge": torch.relu(1 - beta_dpo * logits),
        "ipo": beta_dpo**2 * (logits - 1 / (2 * beta_dpo)) ** 2,
    }[loss_type].mean()
    (gradient,) = torch.autograd.grad(theirs, model)
    beta = convert_beta(beta_dpo, source="diffusers_sd", target="sipo")
    loss_fn = SIPOLoss(NoiseSchedule.flow(shift=1.0), method="diffusion_dpo", beta=beta, loss_type=loss_type)
    ours = loss_fn(model, ref, target, sigmas=torch.full((6,), 0.5)).loss
    (own_gradient,) = torch.autograd.grad(ours, model)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    assert (own_gradient - gradient).norm() < 5e-6 * gradient.norm()
    assert 0 < (beta_dpo * logits < 1).sum() < 3  # the hinge has both of its sides
    assert "`loss.loss_type`" in row_of("loss_type") and f"`{loss_type}`" in row_of("loss_type")


def test_what_may_change_when_a_run_is_resumed_is_what_the_page_says() -> None:
    rows = [line.split("|")[1:3] for line in page_text("resuming").splitlines() if line.startswith("| `training.")]
    may, must = (set(re.findall(r"`training\.(\w+)[`:]", " ".join(row[i] for row in rows[:7]))) for i in (0, 1))
    plain = set(TrainingConfig(1, "o", use_ema=True).identity())
    assert must - {"max_train_steps"} == plain
    assert set(TrainingConfig(1, "o").identity()) == plain - {"ema_decay"}
    assert may - {"lr_scheduler", "timestep_sampling"} == {f.name for f in dataclasses.fields(TrainingConfig)} - plain
    bound = TrainingConfig(1, "o", lr_scheduler="cosine", timestep_sampling="informative", use_ema=True)
    assert set(bound.identity()) == plain | {"max_train_steps", "logging_steps"}


def test_the_table_of_formats_has_every_family_that_has_one() -> None:
    _, _, table = page_text("families").partition("| family | `--format kohya`")
    rows = [line.split("|")[1:4] for line in table.splitlines() if line.startswith("| `")]
    found = {
        family: tuple(format for format, cell in zip(FORMATS[1:], cells, strict=True) if "no such format" not in cell)
        for families, *cells in rows
        for family in re.findall(r"`([^`]+)`", families)
    }
    assert found == {name: formats_of(get_family(name))[1:] for name in FAMILIES if formats_of(get_family(name))[1:]}


def test_numbers_in_the_text_follow_from_the_models() -> None:
    def text(page: str) -> str:
        return " ".join(page_text(page).split())

    sd15, sdxl, wan = (FULL_SIZE[name].parameters for name in ("SD1.5", "SDXL", "Wan 2.1 1.3B"))
    assert f"{sd15:,} weights, {sd15 * 12 / 1e9:.1f} GB a checkpoint" in text("resuming")
    assert f"{46_448_640:,} weights, {46_448_640 * 12 / 1e9:.2f} GB" in text("resuming")
    assert "46_448_640" in text("sdxl-pickapic") and f"{(77 * 2048 + 1280) * 2:,} bytes" in text("sdxl-pickapic")
    assert f"{wan * 2 / 1e9:.2f} GB of frozen bfloat16 weights ({wan:,} of 2 bytes)" in text("wan-clips")
    assert f"{47_185_920 * 16 / 1e9:.2f} GB of trained ones ({47_185_920:,} of LoRA rank 64" in text("wan-clips")
    # The adapters themselves, counted on networks without storage.
    import diffusers
    from peft import LoraConfig

    blocks_of_sdxl: dict[str, Any] = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (320, 640, 1280),
        "attention_head_dim": (5, 10, 20),
        "transformer_layers_per_block": (1, 2, 10),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    }
    with torch.device("meta"):
        networks: dict[str, tuple[Any, int, int, int]] = {
            "sdxl": (diffusers.UNet2DConditionModel(**blocks_of_sdxl), 32, sdxl, 46_448_640),
            "wan": (
                diffusers.WanTransformer3DModel(num_attention_heads=12, ffn_dim=8960, num_layers=30),
                64,
                wan,
                47_185_920,
            ),
        }
        for family, (network, rank, parameters, adapted) in networks.items():
            assert sum(p.numel() for p in network.parameters()) == parameters
            network.requires_grad_(False)
            network.add_adapter(LoraConfig(r=rank, target_modules=list(get_family(family).lora_targets)))
            assert sum(p.numel() for p in network.parameters() if p.requires_grad) == adapted


# ---- Running them ----


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, clip_folder: Path) -> Path:
    return make_workspace(tmp_path_factory.mktemp("docs"), clip_folder)


@pytest.mark.parametrize("page", PAGES)
def test_a_page_runs(page: str, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace)
    shutil.rmtree("runs", ignore_errors=True)  # each page begins again; what was encoded stays
    output, language = "", ""
    for block in blocks(page):
        where = f"{page}.md:{block.line}"
        if block.file:
            Path(block.file).write_text(block.text)
        elif block.language == "sh":
            output = ""
            for command in commands(block):
                program, *words = smaller_words(command.words)
                if program == "sipo":
                    status, said = run_sipo(words)
                else:
                    assert [program, words[0]] == ["accelerate", "launch"], f"{where}: {program} is not run by the test"
                    status, said = run_launch(words[1:], workspace)
                assert status == command.status, f"{where}: {' '.join(command.words)}\n{said}"
                output += said
        elif block.language == "python":
            output = run_python(block.text)
        elif block.language == "text" and language == "python":
            assert block.text == output, where
        elif block.language == "text":
            said_lines = unnumbered(output)
            for line in unnumbered(block.text):
                assert any(line in said for said in said_lines), f"{where}: {line!r} is not in\n{output}"
        language = block.language


def test_the_drop_in_of_the_front_page_gives_what_stood_there_before() -> None:
    """The blocks of README.md run as they stand, one after the other: loss, gradient and what is printed."""
    *programs, shown = [b for b in blocks("../README") if b.language in ("python", "text")]
    assert [b.language for b in programs] == ["python", "python"] and shown.language == "text"
    names: dict[str, Any] = {}
    printed, gradients = "", []
    for block in programs:
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(compile(block.text, f"README.md:{block.line}", "exec"), names)
        printed += output.getvalue()
        gradients.append(names["gradient"])
    before, after = gradients
    out, metrics = names["out"], names["metrics"]
    # By hand, errors near 0.1 are rounded to float32 before they are subtracted and multiplied by 2500.
    assert (after - before).norm() < 1e-4 * before.norm() and before.norm() > 1
    assert out.loss.item() == pytest.approx(names["loss"].item(), abs=1e-4)
    assert metrics["rewards/accuracies"].item() == names["accuracy"].item() == 0.25
    assert printed == shown.text
    listed = re.search(r"((?:^# .*\n)+)metrics = out\.metrics\(\)", programs[1].text, re.M)
    assert listed and re.findall(r"[\w/]+", listed[1].partition(":")[0]) == list(metrics)


def test_the_pages_list_every_family() -> None:
    from sipo.families import FAMILIES

    page = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([^`]+)` \| .* \| `(\w+)`", page, re.MULTILINE)
    assert rows == [(family.name, family.pipeline_class) for family in FAMILIES.values()]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"\[`([^`]+)`\]\(examples/([^)]+)\.yaml\)", readme) == [(name, name) for name in FAMILIES]
