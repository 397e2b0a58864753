"""Two processes do what one does at twice the batch: plain data parallelism and FSDP2, over gloo on the CPU."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sipo import NoiseSchedule, SIPOLoss, processes
from sipo.cli.errors import CommandError, one_line_errors, user_message
from sipo.locks import LockedError, locked
from sipo.processes import OtherProcessError, is_collective, lost_connection
from sipo.training import (
    AdapterOff,
    TrainingInterruptedError,
    gather_weights,
    make_accelerator,
    storage,
    timesteps,
    train,
)
from sipo.training.statistics import read_statistics
from tests.training_cases import Adapted, Network, Pairs, loss, networks, predict, settings, without_adapter


class Grouped(Pairs):
    """Two shapes, and a condition for no caption."""

    groups = (list(range(16)), list(range(16, 24)))
    unconditional = {"class": torch.tensor(0)}  # noqa: RUF012 - as a data set has it

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = super().__getitem__(index)
        if index >= 16:
            item |= {half: item[half][:, :3] for half in ("chosen", "rejected")}
        return item


SHARDED: dict[str, Any] = {
    "max_train_steps": 6,
    "checkpointing_steps": 3,
    "use_ema": True,
    "ema_decay": 0.9,
    "validation_steps": 3,
    "adamw": True,
}
SKIPPING: dict[str, Any] = {
    "max_train_steps": 10,
    "gradient_accumulation_steps": 2,
    "skip_inactive": True,
    "mask_threshold": 0.9,
    "pairs": 1,
}
# What each pair of processes runs; one process then runs the same at twice the batch.
SCENARIOS: dict[str, dict[str, Any]] = {
    "gradient": {"max_train_steps": 1, "max_grad_norm": None, "rate": 1.0},
    "steps": {"max_train_steps": 4, "checkpointing_steps": 4},
    "accumulation": {"max_train_steps": 3, "gradient_accumulation_steps": 2},
    "everything": {
        "max_train_steps": 8,
        "gradient_accumulation_steps": 2,
        "logging_steps": 2,
        "validation_steps": 4,
        "use_ema": True,
        "ema_decay": 0.9,
        "proportion_empty_prompts": 0.3,
        "timestep_sampling": "informative",
        "mask_threshold": 0.9,
        "data": Grouped,
    },
    "adapter": {"max_train_steps": 4, "adapter": True},
    "compiled adapter": {"max_train_steps": 3, "gradient_accumulation_steps": 2, "adapter": True},
    "sharded compiled": {"max_train_steps": 3, "gradient_accumulation_steps": 2, "validation_steps": 2},
    "not its reference": {"max_train_steps": 1, "moved": 1.0},
    "sharded adapter": {"max_train_steps": 4, "adapter": True},
    "sharded bf16": {"max_train_steps": 2, "mixed_precision": "bf16", "flow": True},
    "sharded gradient": {"max_train_steps": 1, "max_grad_norm": None, "rate": 1.0},
    "sharded": SHARDED,
    "sharded resumed": SHARDED,
    "one by one": {"max_train_steps": 3, "gradient_accumulation_steps": 2, "one_by_one": True},
    "sharded one by one": {"max_train_steps": 3, "gradient_accumulation_steps": 2, "one_by_one": True},
    "skipping": SKIPPING,
    "sharded and skipping": SKIPPING,
}


def predict_flow(module: nn.Module, noisy: Tensor, timesteps: Tensor, condition: Any) -> Tensor:
    """With a timestep that weighs so much that its rounding shows."""
    return predict(module, noisy, 5 * timesteps, condition)


def predict_one_by_one(module: nn.Module, noisy: Tensor, timesteps: Tensor, condition: Any) -> Tensor:
    """With several calls of the network before a backward pass, as Qwen-Image 2.1 needs them."""
    calls = []
    for i in range(len(noisy)):
        row = slice(i, i + 1)
        calls.append(predict(module, noisy[row], timesteps[row], {"class": condition["class"][row]}))
    return torch.cat(calls)


def run(folder: Path, accelerator: Accelerator, **options: Any) -> tuple[nn.Module, Any]:
    """One scenario on this process, 8 pairs a pass in all and plain descent unless told else."""
    batch = options.pop("pairs", 4) * 2 // accelerator.num_processes
    policy: Any
    reference: Any
    policy, reference = networks()
    if options.pop("adapter", False):
        policy, reference = Adapted(policy), AdapterOff(without_adapter)
    with torch.no_grad():
        policy.get_parameter(next(n for n, _ in policy.named_parameters())).add_(options.pop("moved", 0.0))
    data = options.pop("data", Pairs)()
    validation = Pairs(7) if "validation_steps" in options else None
    loss_fn = loss(mask_threshold=options.pop("mask_threshold", 0.0))
    flow = options.pop("flow", False)
    if flow:
        loss_fn = SIPOLoss(NoiseSchedule.flow(), beta=50.0, mask_threshold=0.0)
    one_by_one = options.pop("one_by_one", False)
    rate = options.pop("rate", 0.05)
    optimizer = (
        None
        if options.pop("adamw", False)
        else torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=rate)
    )
    resume = options.pop("resume_from", None)
    config = settings(folder, train_batch_size=batch, **options)
    result = train(
        policy,
        reference,
        loss_fn,
        data,
        predict_flow if flow else predict_one_by_one if one_by_one else predict,
        config,
        optimizer=optimizer,
        accelerator=accelerator,
        validation=validation,
        resume_from=resume,
    )
    return policy, result


def accelerator_for(name: str, accumulation: int = 1, mixed_precision: str = "no") -> Accelerator:
    """This process's; under FSDP2 for the scenarios that ask for it."""
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        cpu=True,
        gradient_accumulation_steps=accumulation,
        mixed_precision=mixed_precision,
        dynamo_backend="eager" if "compiled" in name else None,
    )
    if name.startswith("sharded"):
        from accelerate import FullyShardedDataParallelPlugin
        from accelerate.utils import DistributedType

        # accelerate turns FSDP2 on for GPUs alone; all that it does afterwards works on the CPU as well.
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, reshard_after_forward=True)
        plugin.cpu_ram_efficient_loading = False
        if mixed_precision != "no":
            plugin.set_mixed_precision(mixed_precision)
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
        assert accelerator.is_fsdp2
    return accelerator


def one_of_two(folder: str) -> None:
    """What each of two processes does; torch.distributed finds the other through the environment."""
    root = Path(folder)
    timesteps.BINS = 5
    # 600 is accelerate's own default, which it would not pass on.
    accelerator = make_accelerator(settings(root, ddp_timeout=600))
    group = torch.distributed.distributed_c10d._get_default_group()._get_backend(torch.device("cpu"))
    waits = group.options._timeout.total_seconds()
    (root / f"timeout-{accelerator.process_index}").write_text(str(waits))
    for name, options in SCENARIOS.items():
        options = dict(options)
        precision = options.get("mixed_precision", "no")
        accelerator = accelerator_for(name, options.get("gradient_accumulation_steps", 1), precision)
        if name == "sharded resumed":
            # A sharded run that went on from its third step, the one after which is damaged.
            own = root / "sharded resumed"
            if accelerator.is_main_process:
                import shutil

                shutil.copytree(root / "sharded", own, ignore=shutil.ignore_patterns("*.jsonl"))
                (own / "checkpoints/step-00000006/optimizer.safetensors").unlink()
            accelerator.wait_for_everyone()
            options["resume_from"] = "latest"
        policy, result = run(root / name, accelerator, **options)
        weights = gather_weights(policy)
        if accelerator.is_main_process:
            save_file(weights, root / name / "weights.safetensors")
            if result.ema is not None:
                save_file(result.ema, root / name / "ema.safetensors")
            placed = type(next(policy.parameters()).data).__name__
            facts = {"history": result.history, "validation": result.validation, "placed": placed}
            (root / name / "facts.json").write_text(json.dumps(facts))
        accelerator.wait_for_everyone()
    _find_locked(root)
    for name, passes in STOPPED.items():
        _stop_one(root, name, passes)
    _lose_one(root)


def _find_locked(root: Path) -> None:
    """Trains into a folder that another process is writing to."""
    accelerator = accelerator_for("plain")
    try:
        run(root / "locked", accelerator, max_train_steps=2)
    except (LockedError, OtherProcessError) as error:
        (root / f"locked-{accelerator.process_index}").write_text(str(error))


STOPPED = {"stopped": 1, "sharded stopped": 1, "stopped early": 2}
"""Runs of two processes of which the second alone is asked to stop, and forward passes in each of their steps."""


def _stop_one(root: Path, name: str, passes: int) -> None:
    """Asks the second process alone to stop, in the first pass of its second step."""
    accelerator = accelerator_for(name, passes)

    class Asking(Pairs):
        def __getitem__(self, index: int) -> dict[str, Any]:
            if accelerator.process_index == 1 and len(self.seen) == 4 * passes + 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().__getitem__(index)

    try:
        run(
            root / name,
            accelerator,
            max_train_steps=9,
            gradient_accumulation_steps=passes,
            logging_steps=100,
            data=Asking,
        )
    except TrainingInterruptedError as stopped:
        (root / f"{name}-{accelerator.process_index}").write_text(f"{stopped.step} {stopped.signal}")


def _lose_one(root: Path) -> None:
    """Has the second process end in its second step, as a command would, and the first find out by itself."""
    accelerator = accelerator_for("plain")

    class Failing(Pairs):
        def __getitem__(self, index: int) -> dict[str, Any]:
            if accelerator.process_index == 1 and len(self.seen) == 5:
                raise ValueError("pair 5: not there")
            return super().__getitem__(index)

    @one_line_errors
    def command(options: argparse.Namespace) -> int:
        run(root / "lost", accelerator, max_train_steps=9, data=Failing)
        return 0

    try:
        command(argparse.Namespace())
    except CommandError as error:
        (root / f"lost-{accelerator.process_index}").write_text(str(error))
    finally:
        os._exit(0)  # and nothing is said goodbye to


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two processes have run every scenario."""
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    code = "import sys; from tests import test_training_processes as t; t.one_of_two(sys.argv[1])"
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(folder)],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        with locked(folder / "locked", "a test"):
            outputs = [process.communicate(timeout=150)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    return folder


@pytest.fixture(autouse=True)
def few_bins(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the two processes have it: few pairs are then enough for statistics."""
    monkeypatch.setattr(timesteps, "BINS", 5)


def alone(folder: Path, name: str) -> tuple[nn.Module, Any]:
    options = dict(SCENARIOS[name])
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=options.get("gradient_accumulation_steps", 1))
    return run(folder, accelerator, **options)


def facts(folder: Path, name: str) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((folder / name / "facts.json").read_text())
    return read


@pytest.mark.parametrize("name", [n for n in SCENARIOS if n not in ("sharded resumed", "sharded bf16")])
def test_two_processes_do_what_one_does_at_twice_the_batch(two: Path, tmp_path: Path, name: str) -> None:
    policy, result = alone(tmp_path, name)
    found = facts(two, name)
    assert (found["placed"] == "DTensor") == name.startswith("sharded")
    got = load_file(two / name / "weights.safetensors")
    trained = {key: value.detach() for key, value in policy.named_parameters() if value.requires_grad}
    assert got.keys() == trained.keys()
    torch.manual_seed(1)
    start = dict((Adapted(Network()) if "adapter" in name else networks()[0]).named_parameters())
    # AdamW's first steps blow rounding up wherever a gradient is near 0.
    tolerance = {"rtol": 1e-3, "atol": 1e-4} if "adamw" in SCENARIOS[name] else {"rtol": 1e-4, "atol": 2e-6}
    for key, value in trained.items():
        assert (value - start[key].detach()).abs().max() > 1e-4
        torch.testing.assert_close(got[key], value, **tolerance)
    for got_line, line in zip(found["history"], result.history, strict=True):
        # Of two processes one may have to go back for gradients to be reduced that one process has already.
        assert got_line.keys() == line.keys()
        for metric in set(line) - {"seconds", "skipped_passes"}:
            if line[metric] is None:  # a spread of one step
                assert got_line[metric] is None, metric
            else:
                assert got_line[metric] == pytest.approx(line[metric], rel=1e-3, abs=2e-6), metric
    seen, expected = (read_statistics(folder / "timesteps.jsonl") for folder in (two / name, tmp_path))
    for got_line, line in zip(seen, expected, strict=True):
        assert line.keys() == got_line.keys() and line["pairs"] > 0
        for key, value in line.items():
            if isinstance(value, list):  # by noise level: none where a level has no pairs
                assert [x is None for x in got_line[key]] == [x is None for x in value], key
                got, wanted = ([math.nan if x is None else x for x in row] for row in (got_line[key], value))
                assert got == pytest.approx(wanted, rel=2e-3, abs=1e-5, nan_ok=True), key
            else:
                assert got_line[key] == value, key
    for got_line, line in zip(found["validation"], result.validation, strict=True):
        for metric in set(line) - {"seconds", "kind"}:
            assert got_line[metric] == pytest.approx(line[metric], rel=1e-3, abs=1e-5), metric
    if result.ema is not None:
        for key, value in load_file(two / name / "ema.safetensors").items():
            torch.testing.assert_close(value, result.ema[key], **tolerance)


def test_the_gradient_of_two_processes_is_that_of_one(two: Path, tmp_path: Path) -> None:
    # One step of plain descent at a rate of 1 leaves the gradient between the weights and the start.
    policy, _ = alone(tmp_path, "gradient")
    start = dict(networks()[0].named_parameters())
    for name in ("gradient", "sharded gradient"):
        for key, value in load_file(two / name / "weights.safetensors").items():
            expected = (start[key] - policy.state_dict()[key]).detach()
            assert expected.norm() > 1e-3
            # Added up in another order; the difference of two weights has their last bits, not its own.
            assert (start[key].detach() - value - expected).norm() < 2e-5 * expected.norm() + 1e-6


def test_in_bf16_a_sharded_policy_starts_as_its_reference_is(two: Path) -> None:
    # FSDP2 alone would round the timesteps that it is called with to bfloat16, and the reference's not.
    first, second = facts(two, "sharded bf16")["history"]
    assert (first["rewards/margins"], first["chosen_gap"], first["rewards/accuracies"]) == (0.0, 0.0, 0.5)
    assert second["rewards/margins"] != 0.0


def test_everything_was_at_work(two: Path) -> None:
    lines = facts(two, "everything")["history"]
    assert any(line["timestep_share"] < 1 for line in lines)
    for name in ("skipping", "sharded and skipping"):
        skipped = [line["skipped_passes"] for line in facts(two, name)["history"]]
        assert 1 in skipped and 2 in skipped and 0 in skipped  # of a step's two passes
    assert (two / "steps/checkpoints/step-00000004/process-00001.safetensors").exists()


def test_processes_that_find_a_folder_in_use_end_with_one_message(two: Path) -> None:
    messages = [(two / f"locked-{rank}").read_text() for rank in range(2)]
    assert messages[0].startswith(f"training.output_dir='{two / 'locked'}' is in use by process {os.getpid()} since ")
    assert messages[1] == f"process 0: {messages[0]}"
    assert not (two / "locked").exists()  # nothing was written, and the test's own lock made it


@pytest.mark.parametrize("name", STOPPED)
def test_processes_stop_together_and_long_before_the_next_log_line(two: Path, name: str) -> None:
    # With one pass a step, the second step's question is asked before the signal comes.
    step = 3 if STOPPED[name] == 1 else 2
    assert (two / f"{name}-0").read_text() == f"{step} another process"
    assert (two / f"{name}-1").read_text() == f"{step} SIGTERM"
    assert not storage.damage(two / name / f"checkpoints/step-{step:08d}")


def test_a_process_whose_partner_has_ended_says_so_in_a_line(two: Path) -> None:
    assert (two / "lost-1").read_text() == "pair 5: not there"
    said = (two / "lost-0").read_text()
    assert re.fullmatch(
        r"the connection to the other processes is lost \([^()]+\): another process failed \(see its own "
        r"error\), was killed, or did not answer within training.ddp_timeout",
        said,
    )


_GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/"
_CLOSED, _LATE = "Connection closed by peer [::1]:7", "Timed out waiting 600000ms for recv"
_NCCL = "NCCL error in: NCCLUtils.hpp:328, remote process exited, NCCL version 2.21.5 ncclRemoteError: A call failed"
_NETWORK = "the client socket has timed out"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError(f"{_GLOO}pair.cc:553] {_CLOSED}. This is typically caused by a crash"), _CLOSED),
        (RuntimeError(f"{_GLOO}unbound_buffer.cc:81] {_LATE}"), _LATE),
        (torch.distributed.DistBackendError(_NCCL.replace(" nccl", "\nnccl") + ". Last:\nx"), f"{_NCCL}. Last: x"),
        (torch.distributed.DistBackendError("NCCL error, invalid usage.\nDuplicate GPU detected : rank 1 and 0"), ""),
        (torch.distributed.DistNetworkError("The server socket has failed to listen: address already in use"), ""),
        (RuntimeError(f"{_GLOO}pair.cc:456] op.preamble.length <= op.nbytes. 8 vs 4"), ""),
        (torch.distributed.DistNetworkError(_NETWORK), _NETWORK),
        (RuntimeError("the sizes do not match"), ""),
        (ValueError(f"{_GLOO}pair.cc:553] is quoted"), ""),
    ],
)
def test_errors_of_a_collective_library_are_told_from_others(error: Exception, reason: str) -> None:
    said = lost_connection(error)
    assert said.startswith(f"the connection to the other processes is lost ({reason}): ") if reason else said == ""
    assert "\n" not in said


def test_other_errors_of_communication_are_one_line_and_mistakes_of_ours_are_not() -> None:
    gpu = "NCCL error, invalid usage. Duplicate GPU detected : rank 1 and 0"
    assert user_message(torch.distributed.DistBackendError(gpu.replace(". ", ".\n"))) == gpu
    sizes = RuntimeError(f"{_GLOO}pair.cc:456] op.preamble.length <= op.nbytes. 8 vs 4")
    assert user_message(sizes) == "" and is_collective(sizes)


def test_an_error_of_its_own_outlives_that_of_a_partner_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "gathered", Mock(side_effect=RuntimeError(f"{_GLOO}pair.cc:553] {_CLOSED}")))
    with pytest.raises(ValueError, match="row 3: damaged"):
        processes.everywhere(SimpleNamespace(num_processes=2), Mock(side_effect=ValueError("row 3: damaged")))
    with pytest.raises(RuntimeError, match="Connection closed by peer"):
        processes.everywhere(SimpleNamespace(num_processes=2), lambda: None)


def test_processes_wait_for_each_other_as_long_as_the_configuration_says(two: Path) -> None:
    assert [(two / f"timeout-{rank}").read_text() for rank in range(2)] == ["600.0"] * 2  # gloo counts milliseconds


def test_a_sharded_checkpoint_is_whole_and_a_run_resumed_from_it_repeats_itself(two: Path) -> None:
    saved = two / "sharded/checkpoints/step-00000006"
    assert not storage.damage(saved)
    shapes = {key: value.shape for key, value in networks()[0].named_parameters()}
    weights = load_file(saved / "model.safetensors")
    assert {key: value.shape for key, value in weights.items()} == shapes
    moments = load_file(saved / "optimizer.safetensors")
    assert sorted(tuple(t.shape) for key, t in moments.items() if key.endswith("exp_avg")) == sorted(
        tuple(shape) for shape in shapes.values()
    )
    again = two / "sharded resumed"
    assert [line["step"] for line in facts(two, "sharded resumed")["history"]] == [4, 5, 6]
    for name in ("weights.safetensors", "ema.safetensors"):
        for key, value in load_file(two / "sharded" / name).items():
            assert torch.equal(load_file(again / name)[key], value), (name, key)
    for name in ("model.safetensors", "optimizer.safetensors", "ema.safetensors"):
        assert (saved / name).read_bytes() == (again / "checkpoints/step-00000006" / name).read_bytes()
