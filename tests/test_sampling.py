"""Samples of a run: the same whatever the number of processes, without text encoders, in training's precision."""

from __future__ import annotations

import copy
import json
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn

from sipo import processes
from sipo.data.config import DataConfig
from sipo.data.media import resize_and_crop, write_image, write_image_grid
from sipo.data.toy import make_toy_pairs
from sipo.families import Family
from sipo.families.config import ModelConfig
from sipo.families.stable_diffusion import StableDiffusion
from sipo.recipe import sampling as looks
from sipo.recipe.build import RunContext
from sipo.recipe.config import Config, SampleConfig
from sipo.recipe.sampling import ValidationSamples
from sipo.training import TrainingConfig, TrainingWarning
from sipo.training.stopping import StopRequest
from tests.data_sets import noise
from tests.family_cases import folder_of
from tests.small_family import in_processes

PROMPTS = ["a", "a red circle", "two"]


@dataclass
class Exchange:
    """Values that threads in the place of processes leave for each other."""

    barrier: threading.Barrier
    values: list[Any]


@dataclass
class FakeAccelerator:
    """What is used of accelerate's, for one process or for one of several threads that act as processes."""

    process_index: int = 0
    num_processes: int = 1
    exchange: Exchange | None = None
    precision: torch.dtype | None = None
    is_fsdp2: bool = False
    trackers: list[Any] = field(default_factory=list)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    distributed_type: Any = field(default_factory=lambda: type("Plain", (), {"value": "NO"}))

    @property
    def is_main_process(self) -> bool:
        return self.process_index == 0

    def autocast(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.precision is None else torch.autocast("cpu", self.precision)


def gathered(accelerator: FakeAccelerator, value: Any) -> list[Any]:
    exchange = accelerator.exchange
    if exchange is None:
        return [value]
    exchange.values[accelerator.process_index] = value
    exchange.barrier.wait(60)
    found = list(exchange.values)
    exchange.barrier.wait(60)
    return found


@pytest.fixture(autouse=True)
def threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "gathered", gathered)
    load, lock = RunContext.load_encoders, threading.Lock()  # transformers loads in one thread at a time

    def one_by_one(self: RunContext, *, text: bool = True) -> Any:
        with lock:
            return load(self, text=text)

    monkeypatch.setattr(RunContext, "load_encoders", one_by_one)


def run_of(folder: Path, family: str = "sd15", accelerator: Any = None, **samples: Any) -> RunContext:
    from sipo.families import get_family

    config = Config(
        ModelConfig(family=family, pretrained_model_name_or_path=str(folder_of(family)), dtype="float32"),
        DataConfig(
            dataset_name="nowhere", cache=str(folder / "cache"), sizes=[(32, 32)], frames=9 if family == "wan" else 1
        ),
        TrainingConfig(max_train_steps=1, output_dir=str(folder / "run")),
        samples=SampleConfig(validation_prompts=PROMPTS, num_inference_steps=2, **samples),
    )
    path = str(folder_of(family))
    return RunContext(config, get_family(family), accelerator or FakeAccelerator(), path, "nowhere", None)  # type: ignore[arg-type]


def network_of(family: Family) -> nn.Module:
    return family.load_network(folder_of(family.name))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "run" / "samples").iterdir())}


def in_threads(world: int, function: Callable[[Any], Any], **options: Any) -> list[Any]:
    exchange = Exchange(threading.Barrier(world), [None] * world)
    return in_processes(world, lambda one: function(FakeAccelerator(one.process_index, world, exchange, **options)))


@pytest.mark.parametrize("family", ["sd15", "wan"])
def test_samples_do_not_depend_on_the_number_of_processes(tmp_path: Path, family: str) -> None:
    run = run_of(tmp_path / "one", family)
    network = network_of(run.family)
    ValidationSamples(run)(0, network)
    wanted = files(tmp_path / "one")
    names = [f"step-00000000-{i}.mp4" for i in range(3)] if family == "wan" else ["step-00000000.png"]
    assert sorted(wanted) == ["prompts.json", *names]
    assert json.loads(wanted["prompts.json"]) == PROMPTS
    worlds = {"two": (2, {}), "five": (5, {})} if family == "sd15" else {"sharded": (2, {"is_fsdp2": True})}
    for name, (world, options) in worlds.items():
        calls: list[int] = []

        def look(accelerator: Any, folder: Path = tmp_path / name, calls: list[int] = calls) -> ValidationSamples:
            its_run, policy = run_of(folder, family, accelerator), copy.deepcopy(network)
            policy.register_forward_hook(lambda *_: calls.append(accelerator.process_index))
            made = ValidationSamples(its_run)
            made(0, policy)
            return made

        made = in_threads(world, look, **options)
        assert files(tmp_path / name) == wanted
        # A share of the work each, of three prompts; of a network that all hold parts of, as many calls for all.
        counts = [calls.count(rank) for rank in range(world)]
        rounds = {"two": [2, 1], "five": [1, 1, 1, 0, 0], "sharded": [2, 2]}[name]
        assert counts == [sum(counts) // sum(rounds) * each for each in rounds] and sum(counts)
        assert [each.pipeline is None for each in made] == [rank >= 3 for rank in range(world)]


def test_text_is_encoded_once_and_its_encoders_are_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(tmp_path, "sdxl")
    encoded: list[list[str]] = []
    encode = Family.encode_text

    def count(self: Family, pipeline: Any, prompts: list[str], images: Any = None) -> Any:
        encoded.append(list(prompts))
        return encode(self, pipeline, prompts, images)

    monkeypatch.setattr(Family, "encode_text", count)
    look = ValidationSamples(run)
    assert encoded == [PROMPTS, [""]]
    held = {name for name, part in look.pipeline.components.items() if isinstance(part, nn.Module)}
    assert held == {"vae"}
    network = network_of(run.family)
    look(0, network)
    look(1, network)
    assert len(encoded) == 2
    found = files(tmp_path)
    assert found["step-00000000.png"] == found["step-00000001.png"]
    moved: list[str] = []
    monkeypatch.setattr(look.pipeline, "to", lambda device: moved.append(str(device)))
    look(2, network)
    assert moved == ["cpu", "cpu"]  # there, and back again


def test_samples_are_drawn_in_the_precision_of_training(tmp_path: Path) -> None:
    """Under autocast, while the sampler between two calls of the network keeps to float32."""
    found = {}
    for name, precision in (("no", None), ("bf16", torch.bfloat16)):
        run = run_of(tmp_path / name, "sd3", FakeAccelerator(precision=precision))
        network = network_of(run.family)
        inside: list[torch.dtype] = []
        taken: set[torch.dtype] = set()
        linear = next(module for module in network.modules() if isinstance(module, nn.Linear))
        linear.register_forward_hook(lambda module, args, out, inside=inside: inside.append(out.dtype))
        network.register_forward_pre_hook(
            lambda module, args, kwargs, taken=taken: taken.add(kwargs["hidden_states"].dtype), with_kwargs=True
        )
        ValidationSamples(run)(0, network)
        assert set(inside) == {precision or torch.float32} and taken == {torch.float32}
        assert not network._forward_hooks  # the sampler's own is gone
        found[name] = files(tmp_path / name)["step-00000000.png"]
    assert found["no"] != found["bf16"]


def test_a_look_that_fails_in_training_is_a_warning(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    look = ValidationSamples(run)
    fail = Mock(side_effect=torch.OutOfMemoryError("out of memory.\n  Tried to allocate 2 GiB"))
    policy = network_of(run.family).train()
    hook = policy.mid_block.register_forward_hook(fail)  # type: ignore[union-attr, arg-type]
    with pytest.raises(torch.OutOfMemoryError):
        look(0, policy)  # before anything is there to lose
    warned = "step 3: no samples, the run continues without them: OutOfMemoryError: out of memory. Tried to allocate"
    with pytest.warns(TrainingWarning, match=warned):
        look(3, policy)
    assert all(module.training for module in policy.modules()) and not policy._forward_hooks
    assert not (tmp_path / "run" / "samples").exists()
    hook.remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error", TrainingWarning)
        look(4, policy)
    assert sorted(files(tmp_path)) == ["prompts.json", "step-00000004.png"]


@pytest.mark.parametrize("family", ["sd15", "wan2.2"])
def test_a_look_ends_when_the_run_is_asked_to_stop(tmp_path: Path, family: str) -> None:
    """Samples may take minutes, and a launcher kills what has not stopped after seconds."""
    run = run_of(tmp_path, family)
    look, policy = ValidationSamples(run), network_of(run.family)
    parts = run.family.networks_in(policy).values()
    calls: list[int] = []

    def stop(*_: Any) -> None:
        calls.append(len(calls))
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    for part in parts:
        part.register_forward_hook(stop)
    with StopRequest() as request, pytest.warns(TrainingWarning, match="step 5: no samples, .* them: asked to stop$"):
        look(5, policy)
    assert request.signal == "SIGTERM" and len(calls) == 2
    assert not any(part._forward_pre_hooks for part in parts)
    look(6, policy)  # the request ends with the run
    found = sorted(files(tmp_path))
    assert found[0] == "prompts.json" and {name[:13] for name in found[1:]} == {"step-00000006"}


def test_one_process_that_fails_leaves_no_other_waiting(tmp_path: Path) -> None:
    network = network_of(run_of(tmp_path).family)

    def look(accelerator: Any) -> None:
        made, policy = ValidationSamples(run_of(tmp_path, accelerator=accelerator)), copy.deepcopy(network)
        if accelerator.process_index == 1:
            policy.register_forward_hook(lambda *_: 1 / 0)
        made(2, policy)

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        in_threads(2, look)
    said = [str(each.message) for each in seen if isinstance(each.message, TrainingWarning)]
    failed = "step 2: no samples, the run continues without them: process 1: division by zero"
    assert said == [failed]


def test_a_stop_that_another_process_was_asked_for_is_named_plainly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, me = network_of(run_of(tmp_path).family), threading.local()
    monkeypatch.setattr(looks, "asked_to_stop", lambda: me.rank == 1)

    def look(accelerator: Any) -> None:
        me.rank = accelerator.process_index
        ValidationSamples(run_of(tmp_path, accelerator=accelerator))(2, copy.deepcopy(network))

    with pytest.warns(TrainingWarning, match="without them: process 1: asked to stop$"):
        in_threads(2, look)


def test_a_process_that_is_gone_ends_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no training without it."""
    look, policy = ValidationSamples(run_of(tmp_path)), network_of(run_of(tmp_path).family)
    gone = RuntimeError("[/a/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:431")
    monkeypatch.setattr(looks, "from_all", Mock(side_effect=gone))
    with pytest.raises(RuntimeError, match="Connection closed by peer"):
        look(3, policy)


class Edits(StableDiffusion):
    """Keeps the images that it is given, and draws them."""

    condition_image = "required"
    given: ClassVar[list[Any]] = []

    def encode_prompts(self, pipeline: Any, prompts: Any, images: Any = None) -> list[Any]:
        self.given.append(images)
        return [{}] * len(prompts)

    def sample(self, *args: Any, images: Any = None, **options: Any) -> Tensor:  # type: ignore[override]
        return torch.stack(images)


def test_samples_of_edits_are_drawn_from_the_validation_images(tmp_path: Path) -> None:
    names = [str(tmp_path / f"{number}.png") for number in range(3)]
    for number, name in enumerate(names):
        write_image(name, noise(number, 3, 50, 40))
    wanted = [resize_and_crop(noise(number, 3, 50, 40), 32, 32).pixels for number in range(3)]

    def look(accelerator: Any, folder: Path = tmp_path / "two", **options: Any) -> None:
        run = replace(run_of(folder, accelerator=accelerator, validation_images=names), family=Edits())
        ValidationSamples(run)(0, nn.Linear(1, 1))

    in_threads(2, look)
    assert all(torch.equal(image, fitted) for image, fitted in zip(Edits.given[0], wanted, strict=True))
    write_image_grid(tmp_path / "grid.png", torch.stack(wanted))
    assert files(tmp_path / "two")["step-00000000.png"] == (tmp_path / "grid.png").read_bytes()
    in_threads(2, lambda accelerator: look(accelerator, tmp_path / "sharded"), is_fsdp2=True)
    assert files(tmp_path / "sharded") == files(tmp_path / "two")


def test_toy_images_are_those_of_the_toy_pairs(tmp_path: Path) -> None:
    run = run_of(tmp_path, validation_images=["toy", "mine.png", "toy"])
    assert run.validation_images == [Path("toy"), Path("mine.png"), Path("toy")]
    make_toy_pairs(tmp_path / "pairs", video=False, pairs=6, condition_image="optional")
    config = replace(run.config, data=replace(run.config.data, dataset_name="toy"))
    run = replace(run, config=config, data_path=str(tmp_path / "pairs"))
    images = [tmp_path / "pairs/condition/00001.png", Path("mine.png"), tmp_path / "pairs/condition/00005.png"]
    assert run.validation_images == images and all(path.exists() for path in images[::2])


def test_other_prompts_are_said(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    network = network_of(run.family)
    ValidationSamples(run)(0, network)
    other = replace(run, config=replace(run.config, samples=replace(run.config.samples, validation_prompts=["b"])))
    with pytest.warns(
        TrainingWarning, match=r"samples/prompts.json: earlier samples in this folder were drawn from different prompts"
    ):
        ValidationSamples(other)(2, network)
    assert json.loads(files(tmp_path)["prompts.json"]) == ["b"]


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    """As a look is called."""
    with torch.no_grad():
        yield
