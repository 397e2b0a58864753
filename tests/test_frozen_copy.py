"""A frozen reference predicts what the policy does before it is trained, to the bit, in whatever types it is held."""

from __future__ import annotations

import functools
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sipo import cli
from sipo.data.config import DataConfig
from sipo.families.config import ModelConfig
from sipo.families.tuning import freeze, frozen_copy, save_full
from sipo.recipe.build import RunContext, build, frozen_reference, open_run
from sipo.recipe.config import Config
from sipo.training import TrainingWarning
from sipo.training.config import TrainingConfig
from sipo.training.log_reader import read_metrics
from tests.family_cases import each_toy, family_of, folder_of, network_input

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
_FOLDER = tempfile.TemporaryDirectory()


@functools.cache
def trained_toy(toy: str) -> Path:
    """A toy pipeline whose norms, biases and tables have spread, as training leaves them: fresh ones are 1, 0 and 0."""
    folder = Path(_FOLDER.name) / toy
    shutil.copytree(folder_of(toy), folder)
    family = family_of(toy)
    network: Any = family.load_network(folder)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.ndim == 1 or "norm" in name or "table" in name:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    save_full(family, network, folder)
    return folder


def run_of(toy: str, *, precision: str = "no", **model: Any) -> RunContext:
    options: dict[str, Any] = {
        "family": family_of(toy).name,
        "pretrained_model_name_or_path": str(trained_toy(toy)),
    } | model
    training = TrainingConfig(max_train_steps=1, output_dir="unused", mixed_precision=precision)  # type: ignore[arg-type]
    data = DataConfig(dataset_name="unused", cache="unused", frames=9 if family_of(toy).video else 1)
    return open_run(Config(model=ModelConfig(**options), data=data, training=training))


def predictions(toy: str, precision: str, *networks: Any) -> list[Tensor]:
    """What each predicts under autocast, with nothing to be trained: gradients may choose another kernel."""
    given, dtype = network_input(toy), HALF.get(precision, torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=precision != "no"):
        return [family_of(toy).predict(freeze(network), *given) for network in networks]


def types_of(network: nn.Module) -> dict[str, torch.dtype]:
    return {name: tensor.dtype for name, tensor in network.state_dict(keep_vars=True).items()}


# ---- The copy ----


@each_toy
def test_a_copy_in_half_precision_predicts_as_the_policy_does(toy: str) -> None:
    policy, reference = build(
        run_of(toy, precision="bf16", tuning="full", dtype="bfloat16", reference_dtype="bfloat16")
    )
    assert isinstance(reference, nn.Module) and types_of(policy).keys() == types_of(reference).keys()
    for precision, copy in (("bf16", reference), ("fp16", frozen_copy(policy, torch.float16))):
        one, other = predictions(toy, precision, policy, copy)
        assert one.dtype == HALF[precision] and torch.equal(one, other)
    # Nor is it the policy over again: it has half the bytes, but for what autocast leaves in float32.
    sizes = [sum(p.numel() * p.element_size() for p in network.parameters()) for network in (policy, reference)]
    assert sizes[1] < 0.53 * sizes[0]
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    shared = {p.data_ptr() for p in policy.parameters()} & {p.data_ptr() for p in reference.parameters()}
    assert not shared


def test_only_what_autocast_rounds_is_rounded() -> None:
    network = family_of("wan").load_network(trained_toy("wan"))
    copy = frozen_copy(network, torch.bfloat16)
    modules = dict(copy.named_modules())
    for name, dtype in types_of(copy).items():
        owner = modules[name.rpartition(".")[0]]
        rounded = isinstance(owner, (nn.Linear, nn.Conv3d)) and name.endswith(".weight")
        assert dtype == (torch.bfloat16 if rounded else torch.float32), name
    assert types_of(network).keys() == types_of(copy).keys() and set(types_of(network).values()) == {torch.float32}


class OwnProduct(nn.Linear):
    """Multiplies by its weight where autocast does not look."""

    def forward(self, x: Tensor) -> Tensor:
        return (x.unsqueeze(-2) * self.weight).sum(-1) + self.bias


class Unusual(nn.Module):
    """Weights that are more than a linear layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 8)
        self.head = nn.Linear(8, 5)
        self.head.weight = self.table.weight
        self.own = OwnProduct(8, 8)
        self.plain = nn.Linear(8, 8)
        self.parametrised = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.plain(self.own(self.table(tokens)).float())
        return self.head(self.parametrised(x).float())


def test_weights_that_are_more_than_a_linear_layers_stay_as_they_are() -> None:
    torch.manual_seed(0)
    network, tokens = Unusual(), torch.arange(5)
    copy = frozen_copy(network, torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(copy(tokens), freeze(network)(tokens))
    rounded = {name for name, parameter in copy.named_parameters() if parameter.dtype == torch.bfloat16}
    assert rounded == {"plain.weight"} and copy.head.weight is copy.table.weight  # type: ignore[union-attr]


@pytest.mark.parametrize("toy", ["sd15", "wan"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_under_lora_a_copy_keeps_every_type_of_the_policy(toy: str, precision: str) -> None:
    # diffusers keeps some modules of Wan in float32 beside weights in bfloat16, and a cast of the whole would not.
    run = run_of(toy, precision=precision, reference="copy", dtype="bfloat16")
    policy, reference = build(run)
    base = {name.replace(".base_layer", ""): dtype for name, dtype in types_of(policy).items() if "lora" not in name}
    assert isinstance(reference, nn.Module) and types_of(reference) == base
    if toy == "wan":
        assert set(base.values()) == {torch.float32, torch.bfloat16}
    one, other = predictions(toy, precision, policy, reference)
    assert torch.equal(one, other)


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("wanted", [None, "float32", "bfloat16"])
def test_a_reference_for_errors_predicts_as_the_policy_does(tuning: str, wanted: str | None) -> None:
    dtype = "bfloat16" if tuning == "full" else "float32"  # of text encoders, and of what LoRA adapts
    run = run_of("wan", precision="bf16", tuning=tuning, dtype=dtype, reference_dtype=wanted)
    policy, _ = build(run)
    one, other = predictions("wan", "bf16", policy, frozen_reference(run))
    assert torch.equal(one, other)


# ---- Types that cannot agree, and those that are chosen where none is named ----


@pytest.mark.parametrize(
    ("model", "precision", "expected"),
    [
        ({"tuning": "full", "dtype": "bfloat16"}, "no", "float32"),
        ({"tuning": "full"}, "bf16", "bfloat16"),
        ({"dtype": "bfloat16", "reference": "copy"}, "no", "bfloat16"),
        ({"dtype": "bfloat16", "reference": "copy"}, "bf16", "bfloat16"),
        ({"tuning": "full", "reference_dtype": "float32"}, "bf16", "float32"),
        ({"dtype": "float32", "reference_dtype": "float16"}, "no", None),  # adapters off: there is no such reference
    ],
)
def test_a_reference_that_can_agree_does(model: dict[str, Any], precision: str, expected: str | None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", TrainingWarning)
        run = run_of("sd15", precision=precision, **model)
    policy, reference = build(run)
    assert isinstance(reference, nn.Module) == (expected is not None)
    if isinstance(reference, nn.Module):
        assert str(next(reference.parameters()).dtype) == f"torch.{expected}"
        one, other = predictions("sd15", precision, policy, reference)
        assert torch.equal(one, other)
        # Errors of one are those of another: in which type it is held is no mark of it.
        assert run.reference_marks["dtype"] == run.config.policy_dtype


@pytest.mark.parametrize(
    ("model", "precision", "message"),
    [
        (
            {"tuning": "full", "reference_dtype": "bfloat16"},
            "no",
            "model.reference_dtype='bfloat16': the policy's weights are float32 and training.mixed_precision is 'no', "
            "so the two differ before training by what one of them rounds; expected float32",
        ),
        ({"tuning": "full", "reference_dtype": "float16"}, "no", "reference_dtype='float16': .* expected float32$"),
        (
            {"dtype": "bfloat16", "reference_dtype": "float32", "reference": "copy"},
            "bf16",
            "reference_dtype='float32': the policy's weights are bfloat16 .*; expected bfloat16",
        ),
    ],
)
def test_types_that_cannot_agree_are_said_before_anything_runs(
    model: dict[str, Any], precision: str, message: str
) -> None:
    with pytest.warns(TrainingWarning, match=message):
        run = run_of("wan", precision=precision, **model)
    reference = frozen_reference(run)
    # Then it is what diffusers makes of that type, with the modules that it keeps in float32.
    types = {name: dtype for name, dtype in types_of(reference).items() if "norm2" in name or "to_q.weight" in name}
    wanted = getattr(torch, model["reference_dtype"])
    assert all(dtype == (torch.float32 if "norm2" in name else wanted) for name, dtype in types.items()) and types
    assert run.reference_marks["dtype"] == model["reference_dtype"]


# ---- A run ----

SHORT = [
    "training.progress=false",
    "training.report_to=none",
    "training.validation_steps=0",
    "samples.validation_prompts=[]",
]
SHORT += [
    "training.max_train_steps=1",
    "training.checkpointing_steps=1",
    "model.tuning=full",
    "training.mixed_precision=bf16",
]
SHORT += ["model.dtype=bfloat16", "loss.beta=5000", "data.draws=2"]


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The first of a run's, without its folder."""
    cache = tmp_path_factory.mktemp("frozen") / "cache"
    example = Path(__file__).parents[1] / "examples/toy/sd15.yaml"
    return [
        "train",
        str(example),
        *SHORT,
        f"model.pretrained_model_name_or_path={trained_toy('sd15')}",
        f"data.cache={cache}",
    ]


@pytest.mark.parametrize("kind", ["copy", "errors"])
def test_a_run_in_bfloat16_starts_at_its_reference(
    arguments: list[str], tmp_path: Path, kind: str, recwarn: pytest.WarningsRecorder
) -> None:
    more = [f"model.reference={kind}", f"data.reference_errors={str(kind == 'errors').lower()}"]
    assert cli.main([*arguments, *more, "model.reference_dtype=bfloat16", f"training.output_dir={tmp_path}"]) == 0
    first = read_metrics(tmp_path / "metrics.jsonl")[0]
    # Errors come from passes over other batches, whose kernels round bfloat16 in other places.
    limit = 0.0 if kind == "copy" else torch.finfo(torch.bfloat16).eps / 4
    assert first["start_difference"] <= limit and (kind == "errors" or first["start_logit"] == 0.0)
    assert not [w for w in recwarn if w.category is TrainingWarning]


def test_a_run_whose_policy_is_not_its_reference_is_one_line(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def moved(run: RunContext) -> Any:
        policy, reference = build(run)
        with torch.no_grad():
            policy.conv_out.weight.mul_(1.1)  # type: ignore[operator,union-attr]
        return policy, reference

    monkeypatch.setattr("sipo.recipe.train.build", moved)
    assert cli.main([*arguments, f"training.output_dir={tmp_path}"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("sipo: error: step 1: policy and reference differ before training: "), error
    assert not (tmp_path / "checkpoints").exists() and not (tmp_path / "weights").exists()
    monkeypatch.undo()
    assert cli.main([*arguments, f"training.output_dir={tmp_path}"]) == 0  # nothing is in the way of another try
