"""The configuration of sipo train: what it reads, and what it says about mistakes."""

from __future__ import annotations

import itertools
import os
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from conftest import assert_refused

from sipo.families import FAMILIES
from sipo.recipe.config import ConfigError, from_dict, load_config
from sipo.recipe.key_hints import _OTHER_NAMES
from sipo.recipe.train import _write_config
from tests.docs_pages import flat

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").rglob("*.yaml"))


def tree(**sections: dict[str, Any]) -> dict[str, Any]:
    """The least that a configuration needs, with ``sections`` laid over it."""
    least: dict[str, dict[str, Any]] = {
        "model": {"family": "sd15", "pretrained_model_name_or_path": "some/model"},
        "data": {"dataset_name": "pairs.jsonl", "cache": "cache"},
        "training": {"max_train_steps": 3, "output_dir": "out"},
    }
    return {name: least.get(name, {}) | sections.get(name, {}) for name in least | sections}


def test_defaults_are_filled_in_and_written_out() -> None:
    config = from_dict(tree())
    assert config.model.lora.rank == 16 and config.data.sizes == [(512, 512)] and config.loss.method == "sipo"
    assert config.training.max_train_steps == 3
    again = from_dict(config.as_dict())
    assert again == config
    assert from_dict(yaml.safe_load(yaml.safe_dump(config.as_dict()))) == config


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.parquet"])
def test_data_in_the_place_of_a_configuration_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"prompt": "a"}\n')
    with pytest.raises(ConfigError, match="is data, expected a YAML configuration"):
        load_config(tmp_path / name)


def test_what_is_kept_beside_a_run_has_its_letters_as_they_are(tmp_path: Path) -> None:
    given = from_dict(
        tree(samples={"validation_prompts": ["ein großer Bär"]}, training={"output_dir": str(tmp_path / "run")})
    )
    _write_config(SimpleNamespace(config=given, accelerator=None))  # type: ignore[arg-type]
    assert "ein großer Bär" in (tmp_path / "run" / "config.yaml").read_text(encoding="utf-8")


def test_off_and_no_are_words(tmp_path: Path) -> None:
    """YAML 1.1 reads them as False, and with them values that are called so."""
    path = tmp_path / "config.yaml"
    text = (
        yaml.safe_dump(tree(training={"alarms": "X"}, data={"enable_tiling": "Y"}))
        .replace("X", "off")
        .replace("Y", "true")
    )
    path.write_text(text, encoding="utf-8")
    config = load_config(
        path, ["training.mixed_precision=no", "data.skip_bad=True", "model.gradient_checkpointing=yes"]
    )
    assert config.training.alarms == "off" and config.training.mixed_precision == "no"
    assert config.data.enable_tiling is config.data.skip_bad is config.model.gradient_checkpointing is True


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: str(path.relative_to(ROOT / "examples")))
def test_examples_are_configurations(path: Path) -> None:
    config = load_config(path)
    assert config.model.family in path.stem
    assert (config.model.pretrained_model_name_or_path == "toy") == (path.parent.name == "toy")


def test_every_family_has_its_examples() -> None:
    names = {str(path.relative_to(ROOT / "examples")) for path in EXAMPLES}
    assert names >= {f"{folder}{family}.yaml" for folder in ("", "toy/") for family in FAMILIES}


def test_overrides_lie_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree()))
    config = load_config(
        path, ["training.learning_rate=1e-7", "model.lora.rank=8", "loss.beta=20", "data.sizes=[[64, 96]]"]
    )
    assert config.training.learning_rate == 1e-7  # YAML 1.1 takes 1e-7 for a string
    assert config.model.lora.rank == 8 and config.loss.beta == 20.0 and config.data.sizes == [(64, 96)]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"training": {"learning_rat": 1}}, "training.learning_rat: no such key, did you mean training.learning_rate?"),
        ({"loss": {"learning_rate": 1.0}}, "loss.learning_rate: no such key, did you mean training.learning_rate?"),
        ({"model": {"lora": {"rnk": 3}}}, "model.lora.rnk: no such key, did you mean model.lora.rank?"),
        ({"optimizr": {}}, "optimizr: no such key, did you mean training.optimizer?"),
        ({"training": {"steps": 1}}, "training.steps: no such key, did you mean training.max_train_steps?"),
        ({"training": {"batch_size": 1}}, "training.batch_size: no such key, did you mean training.train_batch_size?"),
        ({"training": {"warmup": 1}}, "training.warmup: no such key, did you mean training.lr_warmup_steps?"),
        ({"training": {"num_workers": 1}}, "no such key, did you mean training.dataloader_num_workers?"),
        ({"training": {"trackers": "wandb"}}, "training.trackers: no such key, did you mean training.report_to?"),
        ({"model": {"path": "a"}}, "model.path: no such key, did you mean model.pretrained_model_name_or_path?"),
        ({"data": {"path": "a"}}, "data.path: no such key, did you mean data.dataset_name?"),
        ({"loss": {"link": "a"}}, "loss.link: no such key, did you mean loss.loss_type?"),
        ({"samples": {"prompts": []}}, "samples.prompts: no such key, did you mean samples.validation_prompts?"),
        (
            {"training": {"betas": [0.9, 0.99]}},
            "no such key, did you mean training.adam_beta1 and training.adam_beta2?",
        ),
        ({"training": {"clip": 1}}, "training.clip: no such key, did you mean training.max_grad_norm?"),
        ({"training": {"caption_dropout": 0}}, "no such key, did you mean training.proportion_empty_prompts?"),
        ({"training": {"log_every": 1}}, "training.log_every: no such key, did you mean training.logging_steps?"),
        ({"training": {"save_every": 1}}, "no such key, did you mean training.checkpointing_steps?"),
        ({"training": {"save_steps": 1}}, "no such key, did you mean training.checkpointing_steps?"),
        ({"training": {"save_total_limit": 1}}, "no such key, did you mean training.checkpoints_total_limit?"),
        ({"training": {"keep_checkpoints": 1}}, "no such key, did you mean training.checkpoints_total_limit?"),
        ({"training": {"checkpoint_every": 1}}, "no such key, did you mean training.checkpointing_steps?"),
        ({"training": {"validate_every": 1}}, "no such key, did you mean training.validation_steps?"),
        ({"training": {"eval_steps": 1}}, "no such key, did you mean training.validation_steps?"),
        ({"training": {"eps": 1}}, "training.eps: no such key, did you mean training.adam_epsilon?"),
        ({"training": {"lr_decay": 1}}, "training.lr_decay: no such key, expected one of max_train_steps, "),
        ({"loss": {"winner_preserving": 1}}, "no such key, did you mean loss.safeguard?"),
        ({"loss": {"f_divergence_type": "js"}}, "no such key, did you mean loss.loss_type?"),
        ({"model": {"sft": True}}, "no such key, did you mean loss.method=sft?"),
        ({"loss": {"reduction": "sum"}}, "loss.reduction='sum': expected 'mean', the only one whose gradient"),
        ({"loss": {"reduction": "none"}}, "loss.reduction='none': expected 'mean', the only one whose gradient"),
        (
            {"training": {"use_8bit_adam": True}},
            "use_8bit_adam: no such key, did you mean training.optimizer=adamw8bit?",
        ),
        ({"loss": {"beta_dpo": 5000}}, "loss.beta_dpo: no such key, did you mean loss.beta?"),
        ({"data": {"resolution": 512}}, "data.resolution: no such key, did you mean data.sizes?"),
        ({"num_train_epochs": {}}, "num_train_epochs: no such key, did you mean training.max_train_steps?"),
        ({"training": {"resume": True}}, "training.resume: no such key, did you mean sipo train --resume?"),
        ({"training": {"dtype": "a"}}, "training.dtype: no such key, did you mean model.dtype?"),
        ({"loss": {"optimizr": 1}}, "loss.optimizr: no such key, did you mean training.optimizer?"),
        ({"loss": {"decay": 1}}, "loss.decay: no such key, expected one of method, beta, "),
        (
            {"model": {"lora": {"norm": 1}}},
            "model.lora.norm: no such key, expected one of rank, alpha, dropout, target",
        ),
        ({"steps": {}}, "steps: no such key, did you mean training.max_train_steps?"),
        ({"qqqqqqq": {}}, "qqqqqqq: no such key, expected one of model, data, training, loss, samples"),
        ({"training": {"max_train_steps": "many"}}, "training.max_train_steps='many': expected an integer"),
        ({"training": {"max_train_steps": 1.5}}, "training.max_train_steps=1.5: expected an integer"),
        ({"training": {"use_ema": 2}}, "training.use_ema=2: expected True or False"),
        ({"training": {"report_to": 3}}, "training.report_to=3: expected a string"),
        ({"data": {"sizes": 32}}, "data.sizes=32: expected a list"),
        ({"model": {"lora": 4}}, "model.lora=4: expected a section of keys"),
        ({"training": {"max_train_steps": 0}}, "training.max_train_steps=0: expected at least 1"),
        ({"training": {"learning_rate": -1}}, "training.learning_rate=-1.0: expected a finite number > 0"),
        ({"model": {"tuning": "half"}}, "model.tuning='half': expected one of lora, full"),
        ({"model": {"tuning": "full", "reference": "adapter_off"}}, "expected model.tuning='lora'"),
        ({"model": {"lora": {"rank": 0}}}, "model.lora.rank=0: expected at least 1"),
        ({"model": {"lora": {"alpha": 0}}}, "model.lora.alpha=0.0: expected a finite number > 0"),
        ({"model": {"lora": {"alpha": -4.5}}}, "model.lora.alpha=-4.5: expected a finite number > 0"),
        ({"model": {"lora": {"alpha": float("nan")}}}, "model.lora.alpha=nan: expected a finite number > 0"),
        ({"model": {"lora": {"dropout": 1.0}}}, "model.lora.dropout=1.0: expected a number >= 0 and < 1"),
        ({"model": {"lora": {"dropout": -0.1}}}, "model.lora.dropout=-0.1: expected a number >= 0 and < 1"),
        ({"model": {"shift": 0}}, "model.shift=0.0: expected a finite number > 0"),
        ({"model": {"shift": float("nan")}}, "model.shift=nan: expected a finite number > 0"),
        ({"model": {"shift": float("inf")}}, "model.shift=inf: expected a finite number > 0"),
        (
            {"model": {"prediction_type": "v"}},
            "model.prediction_type='v': expected one of epsilon, v_prediction, sample, flow_prediction",
        ),
        (
            {"training": {"lr_scheduler": "polynomial"}},
            "training.lr_scheduler='polynomial': expected one of constant, constant_with_warmup, cosine, linear",
        ),
        ({"training": {"optimizer": "sgd"}}, "training.optimizer='sgd': expected one of adamw, adamw8bit, paged_adamw"),
        (
            {"training": {"lr_warmup_steps": 5}},
            "training.lr_warmup_steps=5: expected 0 with lr_scheduler='constant', which has no warm-up; "
            "lr_scheduler='constant_with_warmup' has one",
        ),
        (
            {"model": {"tuning": "full", "reference_dtype": "float16"}, "training": {"mixed_precision": "bf16"}},
            "model.reference_dtype='float16' with training.mixed_precision='bf16': expected at most one half-precision",
        ),
        (
            {"model": {"dtype": "float16"}, "training": {"mixed_precision": "bf16"}},
            "model.dtype='float16' with training.mixed_precision='bf16': expected at most one half-precision",
        ),
        (
            {"model": {"dtype": "bfloat16", "reference": "copy", "reference_dtype": "float16"}},
            "model.dtype='bfloat16' with model.reference_dtype='float16': expected at most one half-precision type",
        ),
        (
            {
                "model": {"reference_dtype": "float16"},
                "data": {"draws": 1, "reference_errors": True},
                "training": {"mixed_precision": "bf16"},
            },
            "model.reference_dtype='float16' with training.mixed_precision='bf16': expected at most one half-precision",
        ),
        ({"data": {"reference_errors": True}}, "data.draws=0: expected at least 1"),
        ({"model": {"reference": "errors"}, "data": {"draws": 2}}, "data.reference_errors=False: expected True"),
        ({"data": {"sizes": []}}, "data.sizes=[]: expected at least one [height, width]"),
        ({"data": {"sizes": [[3]]}}, "data.sizes=[[3]]: expected a list of lists of 2 integers"),
        ({"data": {"sizes": [[1, 2, 3]]}}, "data.sizes=[[1, 2, 3]]: expected a list of lists of 2 integers"),
        ({"training": {"max_train_steps": True}}, "training.max_train_steps=True: expected an integer"),
        ({"training": {"learning_rate": True}}, "training.learning_rate=True: expected a number"),
        ({"loss": {"mask_threshold": True}}, "loss.mask_threshold=True is a bool: expected 0 <= mask_threshold <= 1"),
        ({"loss": {"beta": "big"}}, "loss.beta='big' is a str: expected a finite number > 0"),
        ({"data": {"max_pairs": 0}}, "data.max_pairs=0: expected at least 1"),
        ({"data": {"frames": 0}}, "data.frames=0: expected at least 1"),
        ({"samples": {"guidance_scale": float("nan")}}, "samples.guidance_scale=nan: expected a finite number >= 0"),
        ({"samples": {"guidance_scale": -1}}, "samples.guidance_scale=-1.0: expected a finite number >= 0"),
        ({"data": {"fps": 0}}, "data.fps=0.0: expected a finite number > 0"),
        ({"data": {"fps": float("inf")}}, "data.fps=inf: expected a finite number > 0"),
    ],
)
def test_mistakes_are_named_in_one_line(sections: dict[str, Any], message: str) -> None:
    assert_refused(lambda: from_dict(tree(**sections)), ConfigError, message)


@pytest.mark.parametrize(
    ("model", "precision"),
    [
        ({"tuning": "full", "dtype": "float16"}, "bf16"),  # of encoders, which run without mixed precision
        ({"dtype": "bfloat16", "reference_dtype": "float16"}, "no"),  # adapters off: there is no such reference
        ({"dtype": "float16", "reference": "copy", "reference_dtype": "float32"}, "fp16"),
    ],
)
def test_half_precision_types_that_do_not_meet(model: dict[str, Any], precision: str) -> None:
    assert from_dict(tree(model=model, training={"mixed_precision": precision})).training.mixed_precision == precision


def test_names_of_other_scripts_lead_to_keys_that_exist_from_every_section() -> None:
    known = flat(from_dict(tree()).as_dict(), sections=True)
    names = {key.rpartition(".")[2] for key in known}
    for meant, others in _OTHER_NAMES.items():
        for key in re.findall(r"\b(?:model|data|training|loss|samples)\.[a-z_.0-9]+", meant):
            assert key in known
        for other in others.split():
            section, _, name = other.rpartition(".")
            assert name not in names, f"{name} is a key"
            for place in [section] if section else ["model", "data", "training", "loss", "samples"]:
                with pytest.raises(ConfigError) as caught:
                    from_dict(tree(**{place: {name: 1}}))
                assert str(caught.value) == f"{place}.{name}: no such key, did you mean {meant}?"


def test_a_missing_key_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^model\.family: missing, expected a value$"):
        from_dict(tree() | {"model": {"pretrained_model_name_or_path": "some/model"}})
    with pytest.raises(ConfigError, match=r"^training: missing, expected a value$"):
        from_dict(
            {
                "model": {"family": "sd15", "pretrained_model_name_or_path": "p"},
                "data": {"dataset_name": "p", "cache": "c"},
            }
        )


def test_files_that_are_no_configuration(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    with pytest.raises(ConfigError, match=r"run\.yaml: No such file or directory, expected a YAML file"):
        load_config(path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match=r"folder: is a folder, expected a file$"):
        load_config(tmp_path / "folder")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ConfigError, match=r"fifo: is a FIFO, expected a file$"):
        load_config(tmp_path / "fifo")
    path.write_bytes(b"a: \xff")
    with pytest.raises(ConfigError, match=r"run\.yaml: not UTF-8 \(byte 3\)$"):
        load_config(path)
    path.write_text("a: [")
    with pytest.raises(ConfigError, match=r"run\.yaml: not YAML: while parsing .*, line 1$") as caught:
        load_config(path)
    assert "\n" not in str(caught.value)
    path.write_text("- 3")
    with pytest.raises(ConfigError, match="holds a list, expected the sections model, data, training, loss, samples"):
        load_config(path)
    path.write_text(yaml.safe_dump(tree()))
    for override, message in (
        ("steps", "'steps': expected section.key=value"),
        ("model.family.name=3", "'model.family.name=3': family is no section"),
        ("training.max_train_steps=[", r"'training.max_train_steps=\[': not YAML"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config(path, [override])


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in itertools.pairwise("abcdefghij")
)
MERGED = "a: &a {x: 1}\n" + "".join(
    f"{name}: &{name} {{<<: [{', '.join([f'*{before}'] * 9)}]}}\n" for before, name in itertools.pairwise("abcdefghij")
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "holds more than 20000 values, expected a configuration"),
        (MERGED, "holds more than 20000 values, expected a configuration"),
        ("data: &a [*a]", "not YAML: a value refers to itself"),
        ("data: &a {<<: *a}", "not YAML: a value refers to itself"),
        ("data: " + "[" * 100_000, "nested too deeply, expected YAML of at most 64 levels"),
        (
            "data:\n" + "".join(" " * level + "-\n" for level in range(1000)),
            "nested too deeply, expected YAML of at most 64 levels",
        ),
        ("training: {max_train_steps: " + "7" * 5000 + "}", "not YAML: a number of thousands of digits"),
        ("training: {max_train_steps: 2026-13-45}", "not YAML: month must be in 1..12"),
        (
            "training: {max_train_steps: !!python/object:os.system 1}",
            "not YAML: could not determine a constructor for the tag",
        ),
        ("data: {? [a] : b}", "not YAML: while constructing a mapping: found unhashable key, line 1"),
        ("#" * 1_100_000, "has 1100000 bytes, expected at most 1048576 of a configuration"),
        ("data: {a: 1}\ndata: {a: 2}", "not YAML: a key stands twice in one mapping, line 2"),
        ("data:\n  a: 1\n  'a': 2", "not YAML: a key stands twice in one mapping, line 3"),
        ("data: *nothing", "not YAML: found undefined alias 'nothing', line 1"),
        ("a: 1\n--- \nb: 2", "not YAML: expected a single document in the stream: but found another document, line 2"),
        ("\0", "not YAML: "),
        ("a: !!bool maybe", "not YAML: a value that does not fit its tag (KeyError: 'maybe')"),
        ('a: !!int ""', "not YAML: a value that does not fit its tag (IndexError: string index out of range)"),
        ('a: !!float ""', "not YAML: a value that does not fit its tag (IndexError: string index out of range)"),
        ("a: !!int _", "not YAML: a value that does not fit its tag (IndexError: string index out of range)"),
        ("a: 1" + "0" * 6000, "not YAML: a number of thousands of digits"),
        ("a: &x [1, *x]", "not YAML: a value refers to itself"),
        ("a: &x {b: [*x]}", "not YAML: a value refers to itself"),
        ("a: !!timestamp foo", "not YAML: a value that does not fit its tag (AttributeError"),
    ],
    ids=range(24),
)
def test_what_a_file_holds_is_refused_quickly_and_not_printed(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    started = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert time.monotonic() - started < 10  # without bounds they take minutes, or all memory
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500 + len(str(path))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.max_train_steps=[" + "secret, " * 1000 + "]", "training.max_train_steps=['secret', 's"),
        ("training.max_train_steps=" + "7" * 4000, "training.max_train_steps=7777"),
        ("training.max_train_steps=0x" + "f" * 6000, "training.max_train_steps=int: expected an integer of 64 bits"),
        (f"data.sizes=[[64, {1 << 63}]]", "data.sizes=9223372036854775808: expected an integer of 64 bits"),
        ("training.max_train_steps=" + "[" * 1000, "'training.max_train_steps=[[[["),
        ("data='" + "secret" * 1000 + "'", "data='secretsecret"),
        ("training." + "secret" * 1000 + "=1", "training.secretsecret"),
        ("training.learning_rate=0x" + "f" * 300, "training.learning_rate="),
        ("secret" * 1000, "'secretsecret"),
    ],
    ids=range(9),
)
def test_long_values_are_not_printed_whole(tmp_path: Path, override: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree()))
    with pytest.raises(ConfigError) as caught:
        load_config(path, [override])
    assert message in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 1000


def test_aliases_are_allowed(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree()) + "samples: {validation_prompts: [&a cat, *a, dog]}\n")
    assert load_config(path).samples.validation_prompts == ["cat", "cat", "dog"]


def test_the_reference_follows_from_tuning_and_data() -> None:
    assert from_dict(tree()).reference_kind == "adapter_off"
    assert from_dict(tree(model={"tuning": "full"})).reference_kind == "copy"
    errors = {"draws": 2, "reference_errors": True}
    assert from_dict(tree(data=errors)).reference_kind == "errors"
    assert from_dict(tree(data=errors, model={"reference": "copy"})).reference_kind == "copy"


# ---- Paths ----

PATHS = [
    ("model", "pretrained_model_name_or_path"),
    ("data", "dataset_name"),
    ("data", "cache"),
    ("training", "output_dir"),
]


def path_of(config: Any, section: str, name: str) -> str:
    return str(getattr(getattr(config, section), name))


@pytest.mark.parametrize(("section", "name"), PATHS)
def test_home_and_environment_are_filled_in_in_every_path(
    section: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/folder/of/someone")
    monkeypatch.setenv("SIPO_TEST_DATA", "/data/x")
    file = tmp_path / "config.yaml"
    for given, expected in (
        ("~/a", "/folder/of/someone/a"),
        ("$SIPO_TEST_DATA/a", "/data/x/a"),
        ("${SIPO_TEST_DATA}a/$", "/data/xa/$"),
        ("owner/name", "owner/name"),
        ("a~/b", "a~/b"),
    ):
        file.write_text(yaml.safe_dump(tree(**{section: {name: given}})))
        assert path_of(load_config(file), section, name) == expected
        file.write_text(yaml.safe_dump(tree()))
        config = load_config(file, [f"{section}.{name}={given}"])
        assert path_of(config, section, name) == expected
        assert path_of(from_dict(config.as_dict()), section, name) == expected  # as a run keeps it
    for given, message in (
        ("$SIPO_UNSET/a", "'$SIPO_UNSET/a': the environment variable SIPO_UNSET is not set"),
        ("${SIPO_UNSET}", "'${SIPO_UNSET}': the environment variable SIPO_UNSET is not set"),
        ("~nobody-of-this-name/a", "'~nobody-of-this-name/a': no home folder of that user is known"),
    ):
        with pytest.raises(ConfigError) as caught:
            load_config(file, [f"{section}.{name}={given}"])
        assert str(caught.value) == f"{section}.{name}={message}"


def test_a_path_that_is_there_stays_as_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PRICE", "7")
    config = from_dict(tree(data={"cache": "at-$PRICE"}))
    assert config.data.cache == "at-7"
    Path("at-$PRICE").mkdir()
    assert from_dict(tree(data={"cache": "at-$PRICE"})).data.cache == "at-$PRICE"
    Path("$NOT_SET_HERE").mkdir()
    assert from_dict(tree(data={"cache": "$NOT_SET_HERE"})).data.cache == "$NOT_SET_HERE"
