"""A model's folder before any library reads it: pickles, code and damaged files are refused, and hubs asked once."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sipo.data.scorers import ScorerError, _Clip
from sipo.families import get_family, model_files
from sipo.files import FileError, check_safetensors
from tests.family_cases import folder_of

WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


class Mark:
    """What is unpickled leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder_of("sd15"), tmp_path / "model"))


@pytest.fixture
def loaded(tmp_path: Path) -> Iterator[Callable[[Any], Any]]:
    """Loads weights with ``torch.load`` as libraries do, but for what makes it safer; nothing may come of it."""
    calls: list[Any] = []
    original = torch.load

    def load(file: Any, *args: Any, **options: Any) -> Any:
        calls.append(file)
        return original(file, *args, **{**options, "weights_only": False})

    torch.load = load
    yield calls.append
    torch.load = original
    assert calls == [] and not (tmp_path / "mark").exists()


def message_of(folder: Path | str, component: str = "unet", **options: Any) -> str:
    family = get_family("sd15")
    load = family.load_network if component == "unet" else family.load_encoders
    with pytest.raises((ValueError, OSError)) as caught:
        load(folder, **options)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    return str(caught.value)


def pickled(model: Path, component: str, tmp_path: Path) -> Path:
    """Weights as a pickle in the place of safetensors, which would leave a mark where they are read."""
    weights = model / component / f"{WEIGHTS[component]}.safetensors"
    state: dict[str, Any] = dict(load_file(weights))
    file = model / component / "pytorch_model.bin"
    torch.save({**state, "mark": Mark(tmp_path / "mark")}, file)
    weights.unlink()
    return file


@pytest.mark.parametrize("component", WEIGHTS)
def test_an_index_that_names_a_pickle_is_refused(component: str, model: Path, tmp_path: Path, loaded: Any) -> None:
    names = list(load_file(model / component / f"{WEIGHTS[component]}.safetensors"))
    file = pickled(model, component, tmp_path)
    index = model / component / f"{WEIGHTS[component]}.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, file.name)}))
    message = message_of(model, component)
    assert f"{index}: names 'pytorch_model.bin', expected safetensors beside it: nothing is unpickled" in message


@pytest.mark.parametrize("component", WEIGHTS)
def test_a_pickle_alone_and_a_pickle_by_another_name_are_refused(
    component: str, model: Path, tmp_path: Path, loaded: Any
) -> None:
    file = pickled(model, component, tmp_path)
    message = message_of(model, component)
    assert "holds pytorch_model.bin, a pickle, which is not read here" in message
    assert ".from_pretrained(FOLDER).save_pretrained(FOLDER)` writes them" in message
    named = model / component / f"{WEIGHTS[component]}.safetensors"
    named.symlink_to(file)
    assert f"{named}: is a pickle, which is not read here" in message_of(model, component)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_map": None}, "has no weight_map"),
        ({"weight_map": {"a": "../unet/diffusion_pytorch_model.safetensors"}}, "names '../unet/"),
        ({"weight_map": {"a": "absent.safetensors"}}, "absent.safetensors"),
        ({"weight_map": {"a": 3}}, "names '3', expected safetensors"),
    ],
)
def test_an_index_that_is_none_is_refused(changes: dict[str, Any], message: str, model: Path) -> None:
    (model / "text_encoder" / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}} | changes))
    assert message in message_of(model, "text_encoder")


def test_adapters_beside_weights_and_code_of_others_are_refused(model: Path, tmp_path: Path, loaded: Any) -> None:
    part = model / "text_encoder"
    torch.save({"mark": Mark(tmp_path / "mark")}, part / "adapter_model.bin")
    (part / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "elsewhere/model"}))
    assert f"{part}: has adapter_config.json, expected a CLIPTextModel alone" in message_of(model, "text_encoder")
    (part / "adapter_config.json").unlink()
    config = json.loads((part / "config.json").read_text())
    (part / "config.json").write_text(json.dumps(config | {"transformers_weights": "adapter_model.bin"}))
    assert "has transformers_weights='adapter_model.bin' in its config.json" in message_of(model, "text_encoder")
    (part / "config.json").write_text(json.dumps(config))
    index = json.loads((model / "model_index.json").read_text())
    for entry, text in (
        (["pipeline", "CLIPTextModel"], "its text_encoder is 'CLIPTextModel' of 'pipeline', whose code is not run"),
        (["os", "system"], "its text_encoder is 'system' of 'os', whose code is not run"),
        (["transformers", "AutoModel"], "its text_encoder is 'AutoModel', expected one of the classes of transformers"),
        (["transformers", "Nothing"], "its text_encoder is 'Nothing', expected one of the classes"),
    ):
        (model / "model_index.json").write_text(json.dumps(index | {"text_encoder": entry}))
        (part / "pipeline.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')")
        assert text in message_of(model, "text_encoder")


@pytest.mark.parametrize("component", WEIGHTS)
def test_damaged_weights_are_one_line_that_names_the_file(component: str, model: Path) -> None:
    weights = model / component / f"{WEIGHTS[component]}.safetensors"
    sound = weights.read_bytes()
    length = int.from_bytes(sound[:8], "little")
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 3438167540\n"
    for content, text in (
        (pointer, "is a Git LFS pointer, expected the weights themselves: `git lfs pull` fetches them"),
        (sound[:-1], "not a sound safetensors file"),
        (sound[: length // 2], "not a sound safetensors file"),
        (b"", "not a sound safetensors file (0 bytes"),
        (sound[:20] + b"\xff" + sound[21:], "not a sound safetensors file"),
    ):
        weights.write_bytes(content)
        assert f"{weights}: {text}" in message_of(model, component)
    weights.unlink()
    os.mkfifo(weights)
    assert f"{weights}: is a FIFO, expected a file" in message_of(model, component)


def test_no_special_file_is_opened(model: Path) -> None:
    for name in ("tokenizer/tokenizer.json", "scheduler/scheduler_config.json", "vae/config.json", "model_index.json"):
        file = model / name
        content = file.read_bytes()
        file.unlink()
        os.mkfifo(file)
        load = get_family("sd15").load_scheduler if name.startswith("scheduler") else get_family("sd15").load_encoders
        with pytest.raises((ValueError, OSError), match=rf"{file.name}"):
            load(model)
        file.unlink()
        file.write_bytes(content)


def test_weights_of_another_network_are_one_line(model: Path) -> None:
    for component in ("unet", "text_encoder"):
        file = model / component / "config.json"
        config = json.loads(file.read_text())
        width = {"unet": {"block_out_channels": [24, 32]}, "text_encoder": {"hidden_size": 64}}[component]
        file.write_text(json.dumps(config | width))
        message_of(model, component)
        file.write_text("{")
        assert f"{file}: not JSON" in message_of(model, component)
        file.write_text(json.dumps(config))


@pytest.mark.parametrize("component", WEIGHTS)
def test_weights_without_one_of_their_tensors_are_refused(component: str, model: Path) -> None:
    """Libraries would put random numbers in its place, with a line that nobody sees."""
    file = model / component / f"{WEIGHTS[component]}.safetensors"
    tensors = load_file(file)
    name = next(name for name in sorted(tensors) if "norm" in name)
    save_file({key.replace(name, "of.another.name"): tensor for key, tensor in tensors.items()}, file, {"format": "pt"})
    text = f"{file.parent}: its weights have no {name}, expected those of a whole "
    assert text in message_of(model, component)


@pytest.mark.parametrize("removed", ["tokenizer", "tokenizer/tokenizer.json", "tokenizer/*"])
def test_a_tokenizer_without_its_vocabulary_is_refused(removed: str, model: Path) -> None:
    # transformers would make one of its special tokens alone, to which every caption is the same.
    for path in list(model.glob(removed)):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    reason = "no such folder, expected a " if removed == "tokenizer" else "has no vocabulary, expected tok"
    assert f"{model / 'tokenizer'}: {reason}" in message_of(model, "text_encoder")


def test_a_tokenizer_with_a_few_tokens_is_refused(model: Path) -> None:
    file = model / "tokenizer" / "tokenizer.json"
    kept = json.loads(file.read_text())
    kept["model"] |= {"vocab": {"<|startoftext|>": 0, "<|endoftext|>": 1}, "merges": []}
    file.write_text(json.dumps(kept))
    message = message_of(model, "text_encoder")
    assert f"{model / 'tokenizer'}: its vocabulary has " in message and "expected about the 517 of its" in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scaling_factor": "x"}, "scaling_factor='x', expected a positive number"),
        ({"scaling_factor": None}, "scaling_factor=None, expected a positive number"),
        ({"scaling_factor": 0}, "scaling_factor=0, expected a positive number"),
        ({"scaling_factor": 10**400}, "expected a positive number"),
        ({"shift_factor": True}, "shift_factor=True, expected a finite number"),
        ({"latents_mean": [0, 0, 0, float("nan")]}, "latents_mean=[0, 0, 0, nan], expected finite numbers"),
        ({"latents_mean": 1}, "latents_mean=1, expected finite numbers, one for each of 4 channels"),
        ({"latents_std": [1, 1, 1]}, "latents_std=[1, 1, 1], expected positive numbers, one for each of 4 channels"),
    ],
)
def test_values_of_a_vae_that_latents_cannot_be_scaled_by_are_refused(
    changes: dict[str, Any], message: str, model: Path
) -> None:
    file = model / "vae" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    found = message_of(model, "vae")
    assert found.startswith(f"{file}: ") and message in found


@pytest.mark.parametrize(
    "changes",
    [
        {"attn_implementation": "someone/kernel"},
        {"_attn_implementation": "someone/kernel:flash"},
        {"_attn_implementation": {"": "eager", "text_config": "someone/kernel"}},
        {"text_config": {"_attn_implementation_internal": "eager", "attn_implementation": "someone/kernel"}},
    ],
)
def test_kernels_of_the_hub_are_refused(changes: dict[str, Any], model: Path) -> None:
    file = model / "text_encoder" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    message = message_of(model, "text_encoder")
    assert message.startswith(f"{file}: names 'someone/kernel") and "which is not run here" in message


def test_a_class_has_the_article_that_it_is_spoken_with(model: Path) -> None:
    shutil.rmtree(model / "vae")
    (model / "vae").mkdir()
    (model / "vae" / "config.json").write_text("{}")
    assert message_of(model, "vae").endswith("expected those of an AutoencoderKL")
    assert model_files.with_article("UNet2DConditionModel") == "a UNet2DConditionModel"


@pytest.mark.parametrize("length", [128, 384, 640, 896, 1152, 0x4B50])
def test_a_header_is_not_taken_for_a_pickle_by_its_length(length: int, tmp_path: Path) -> None:
    """The first bytes are a length, in which those of pickles and archives occur."""
    file = tmp_path / "x.safetensors"
    filler = length - 96
    while True:
        save_file({"x": torch.zeros(1)}, file, metadata={"a": "b" * filler})
        found = int.from_bytes(file.read_bytes()[:8], "little")
        if found == length:
            break
        filler += length - found
    check_safetensors(file)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(FileError, match="not a sound safetensors file"):
        check_safetensors(file)


def test_scorers_read_no_pickles(tmp_path: Path, loaded: Any) -> None:
    from transformers import CLIPConfig, CLIPModel

    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    clip = CLIPModel(CLIPConfig(text_config=small | {"vocab_size": 9}, vision_config=small | {"image_size": 32}))
    folder = tmp_path / "clip"
    clip.save_pretrained(folder)
    names = list(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    torch.save({**clip.state_dict(), "mark": Mark(tmp_path / "mark")}, folder / "pytorch_model.bin")
    for index in (None, {"metadata": {}, "weight_map": dict.fromkeys(names, "pytorch_model.bin")}):
        if index is not None:
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(ScorerError, match=r"pickle|nothing is unpickled") as caught:
            _Clip(str(folder), None, "cpu")
        assert "\n" not in str(caught.value)
    shutil.rmtree(folder)
    clip.save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer"}')
    with pytest.raises(ScorerError, match="has no vocabulary, expected tokenizer"):
        _Clip(str(folder), None, "cpu")
    for device in ("nonsense", "cuda:77"):
        with pytest.raises(ScorerError, match=f"^device='{device}': .*, expected another$"):
            _Clip(str(folder), None, device)


# ---- Paths that lead nowhere, and hubs ----


class Hub:
    """Answers as a hub does, from a folder; counts what it is asked."""

    def __init__(self, folder: Path | None, name: str = "owner/name", commit: str = "c" * 40) -> None:
        hub = self
        self.asked: list[str] = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if "/owner/" in self.path:  # and not what the library asks about itself
                    hub.asked.append(self.path)
                body, kind = hub.answer(self.path.partition("?")[0])
                self.send_response(404 if body is None else 200)
                if body is None:
                    self.send_header("X-Error-Code", "RepoNotFound")
                    body = b""
                for key, value in {
                    "Content-Type": kind,
                    "Content-Length": str(len(body)),
                    "ETag": f'"{hash(body):x}"',
                    "X-Repo-Commit": commit,
                }.items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            do_HEAD = do_GET  # noqa: N815

            def log_message(self, *args: Any) -> None:
                pass

        self.folder, self.name, self.commit = folder, name, commit
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, path: str) -> tuple[bytes | None, str]:
        if self.folder is None or self.name not in path:
            return None, "text/plain"
        names = [file.relative_to(self.folder).as_posix() for file in self.folder.rglob("*") if file.is_file()]
        if "/tree/" in path:
            tree = [
                {"type": "file", "path": name, "size": (self.folder / name).stat().st_size, "oid": "0" * 40}
                for name in names
            ]
            return json.dumps(tree).encode(), "application/json"
        if path.startswith("/api/models/"):
            listed = {"id": self.name, "sha": self.commit, "siblings": [{"rfilename": name} for name in names]}
            return json.dumps(listed).encode(), "application/json"
        name = path.rpartition(f"/resolve/{self.commit}/")[2] or path.rpartition("/resolve/main/")[2]
        file = self.folder / name
        return (file.read_bytes() if file.is_file() else None), "application/octet-stream"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[Path | None], Hub]]:
    """Starts a hub that the library asks, with an empty cache of its own."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(model_files, "_snapshots", {})
    started: list[Hub] = []

    def start(folder: Path | None) -> Hub:
        started.append(Hub(folder))
        address = f"http://127.0.0.1:{started[-1].server.server_address[1]}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", address, raising=False)
        monkeypatch.setattr(
            "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
            address + "/{repo_id}/resolve/{revision}/{filename}",
        )
        return started[-1]

    yield start
    for each in started:
        each.server.shutdown()
        each.server.server_close()


def test_a_hub_model_is_fetched_without_its_pickles_and_checked(hub: Any, model: Path, tmp_path: Path) -> None:
    for component, name in WEIGHTS.items():
        (model / component / "pytorch_model.bin").write_bytes(b"pickle")
        (model / component / f"{name}.fp16.safetensors").write_bytes(b"of a variant")
    server = hub(model)
    family = get_family("sd15")
    assert family.load_schedule("owner/name").num_train_timesteps == 1000
    assert not any("safetensors" in path for path in server.asked)
    network = family.load_network("owner/name")
    family.load_encoders("owner/name")
    snapshot = tmp_path / "hub" / "models--owner--name" / "snapshots" / ("c" * 40)
    here = {path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file()}
    assert {f"{part}/{name}.safetensors" for part, name in WEIGHTS.items()} < here
    assert not any("fp16" in name or name.endswith(".bin") for name in here)
    assert sum(path.startswith("/api/models/owner/name") and "tree" not in path for path in server.asked) <= 4
    given = load_file(model / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(tensor, given[name]) for name, tensor in network.state_dict().items())
    # Without the hub, the cache serves: asked for once and no more.
    server.folder, count = None, len(server.asked)
    model_files._snapshots.clear()
    family.load_network("owner/name")
    assert len(server.asked) <= count + 1


def test_a_hub_model_with_a_pickle_in_its_index_is_refused(hub: Any, model: Path, tmp_path: Path, loaded: Any) -> None:
    names = list(load_file(model / "text_encoder" / "model.safetensors"))
    pickled(model, "text_encoder", tmp_path)
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "pytorch_model.bin")}
    (model / "text_encoder" / "model.safetensors.index.json").write_text(json.dumps(index))
    hub(model)
    with pytest.raises(FileError, match=r"names 'pytorch_model.bin', expected safetensors beside it"):
        get_family("sd15").load_encoders("owner/name")


def test_a_path_that_leads_nowhere_costs_one_request_at_most(hub: Any, tmp_path: Path) -> None:
    server = hub(None)
    message = message_of("owner/mistyped")
    expected = "no such folder, and no hub id that answers (not found; a private one needs `hf auth login`)"
    assert message.startswith(f"owner/mistyped: {expected}")
    assert "expected a StableDiffusionPipeline" in message and len(server.asked) == 1
    message_of("owner/mistyped")
    for path in ("/absent", "./absent", "~/absent", "of/three/parts", "a b", "models/sd15.safetensors", "x" * 200):
        assert f"{path}: no such f" in message_of(path)
    assert len(server.asked) == 2


def test_a_hub_that_does_not_answer_is_asked_once(
    hub: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import socket

    hub(None)
    counted: list[Any] = []
    original = socket.create_connection

    def connect(*args: Any, **options: Any) -> Any:
        counted.append(args)
        return original(*args, **options)

    monkeypatch.setattr(socket, "create_connection", connect)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", "http://127.0.0.1:9", raising=False)
    message = message_of("owner/name")
    assert message.startswith("owner/name: no such folder, and no hub id that answers (") and "refused" in message
    assert len(counted) == 1


def test_offline_nobody_is_asked(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    server = hub(None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "no hub id that answers (HF_HUB_OFFLINE is set)" in message_of("owner/name")
    assert server.asked == []


@pytest.mark.parametrize("name", ["model.safetensors", "v1-5.ckpt"])
def test_a_single_file_is_named_as_such(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_bytes(b"weights")
    message = message_of(file)
    assert "is a file, expected a folder with a StableDiffusionPipeline" in message
    assert "`diffusers.StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER)` makes one" in message
