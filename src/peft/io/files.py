# SPDX-License-Identifier: Apache-2.0
"""Files of adapters: reading from folders and the hub, writing, uploading. Writing is atomic, see `io/atomic.py`."""

import math
import os
import pickle
import re
import tempfile
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..config import CONFIG_NAME, PeftConfig
from ..utils.constants import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from ..utils.error import AdapterFileError
from .atomic import current, transaction
from .atomic import write_text_atomic as write_text_atomic


class Tensors(dict[str, torch.Tensor]):
    """Tensors by key; `metadata` is the text a safetensors file holds beside them. If they were read as views of one
    tensor [numbers], that is `flat`.
    """

    def __init__(self, tensors: Any = (), metadata: dict[str, str] | None = None, flat: torch.Tensor | None = None):
        super().__init__(tensors)
        self.metadata, self.flat = metadata or {}, flat

    def __reduce__(self):
        """Pickled as what `torch.load` takes without running code: an ordered dict."""
        return OrderedDict, (), None, None, iter(self.items())


# ---- writing


def split_shared(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """Contiguous tensors with a storage each: of those that share one, all but the first are copied."""
    seen: set[tuple[Any, ...]] = set()
    split = Tensors(metadata=getattr(tensors, "metadata", None))
    for key, tensor in tensors.items():
        if tensor.device.type == "meta":
            raise RuntimeError(
                f"Cannot save {key!r}: it is on the meta device and has no values. Load the adapter's weights first; "
                "a model built with `low_cpu_mem_usage=True` gets them from a file."
            )
        tensor = tensor.detach()
        storage = tensor.untyped_storage()
        place = (tensor.device, storage.data_ptr(), storage.nbytes())
        if place in seen and storage.nbytes() > 0:
            tensor = tensor.clone()
        seen.add(place)
        split[key] = tensor.contiguous()
    return split


def _save_safetensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    split = split_shared(tensors)
    save_file(split, str(path), metadata={**split.metadata, "format": "pt"})


def save_adapter(
    folder: str | os.PathLike, state: Mapping[str, torch.Tensor], config: PeftConfig, *, safe_serialization: bool = True
) -> None:
    """Write weights and configuration of one adapter; together they replace what is in `folder`, or nothing does."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    stale = WEIGHTS_NAME if safe_serialization else SAFETENSORS_WEIGHTS_NAME  # readers would find the other format
    with transaction(folder, remove=(stale,)) as new:
        if safe_serialization:
            _save_safetensors(state, new / SAFETENSORS_WEIGHTS_NAME)
        else:
            torch.save(dict(state), new / WEIGHTS_NAME)
        config.save_pretrained(new)


# ---- reading


def torch_load(*args: Any, weights_only: bool = True, **kwargs: Any) -> Any:
    """torch.load that runs no code from the file, unless asked to."""
    return torch.load(*args, weights_only=weights_only, **kwargs)


def read_tensors(path: str | os.PathLike, device: str = "cpu") -> Tensors:
    """Tensors of a weights file (.safetensors or .bin), with errors that say what is wrong with it."""
    path = Path(path)
    return _read_safetensors(path, device) if path.suffix == ".safetensors" else _read_bin(path, device)


def _read_safetensors(path: Path, device: str) -> Tensors:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt", device=device) as file:
            return _mapped(path, file, device) or Tensors(
                {k: file.get_tensor(k) for k in file.keys()},  # noqa: SIM118
                file.metadata(),
            )
    except SafetensorError as error:
        raise AdapterFileError(
            f"Cannot read the adapter weights {str(path)!r}: {_diagnosis(path)} ({error}). Nothing was loaded."
        ) from error


# Files of one of these types are nearly all that there are.
_FLAT_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def _mapped(path: Path, file: Any, device: str) -> Tensors | None:
    """The tensors of an open file as views of one: a third of the time of getting them one by one. None where they
    are of several types, or not for the CPU.
    """
    slices = {key: file.get_slice(key) for key in file.offset_keys()}
    names = {s.get_dtype() for s in slices.values()}
    dtype = _FLAT_DTYPES.get(names.pop()) if len(names) == 1 else None
    if dtype is None or torch.device(device).type != "cpu":
        return None
    shapes = [s.get_shape() for s in slices.values()]
    sizes = [math.prod(shape) for shape in shapes]
    size = path.stat().st_size  # the numbers stand at the end of the file, without holes: safe_open has looked
    start = size - sum(sizes) * dtype.itemsize
    if start % dtype.itemsize:
        return None
    flat = torch.from_file(str(path), False, size, dtype=torch.uint8)[start:].view(dtype)
    views = zip(slices, flat.split(sizes), shapes, strict=True)
    return Tensors({key: view.view(shape) for key, view, shape in views}, file.metadata(), flat)


def _diagnosis(path: Path) -> str:
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(64)
    if start.startswith((b"PK\x03\x04", b"\x80")):
        return f"it is a pickle (torch.save), not a safetensors file. If you trust it, call it {WEIGHTS_NAME}"
    if start.startswith(b"version https://git-lfs"):
        return "it is a git-lfs pointer, the file itself was not downloaded (git lfs pull)"
    if size < 8 or (0 < int.from_bytes(start[:8], "little") < 100_000_000 and start[8:9] in (b"{", b"")):
        return f"it is truncated, only {size:,} bytes are there. Copy or download it again"
    return f"it is no safetensors file ({size:,} bytes)"


def _read_bin(path: Path, device: str) -> Tensors:
    try:
        found = torch_load(path, map_location=torch.device(device))
    except pickle.UnpicklingError as error:
        raise AdapterFileError(
            f"Refusing to load {str(path)!r}: it is damaged, or holds pickled objects other than tensors, which could "
            f"run code. Convert it to {SAFETENSORS_WEIGHTS_NAME} where you trust it. ({str(error).splitlines()[0]})"
        ) from error
    except (RuntimeError, EOFError, ValueError) as error:
        raise AdapterFileError(
            f"Cannot read the adapter weights {str(path)!r}: with {path.stat().st_size:,} bytes it is truncated or no "
            f"torch file ({error}). Nothing was loaded."
        ) from error
    if not isinstance(found, dict) or not all(isinstance(v, torch.Tensor) for v in found.values()):
        raise AdapterFileError(f"{str(path)!r} holds a {type(found).__name__}, expected a dict of tensors.")
    return Tensors(found)


def read_adapter(
    path: str | os.PathLike, subfolder: str | None = None, device: str | None = "cpu", **hub: Any
) -> tuple[Any, Tensors]:
    """(configuration, tensors) of an adapter in a folder or hub repository, without any model."""
    hub = hub_options(hub)
    config = PeftConfig.from_pretrained(path, subfolder=subfolder, **hub)
    return config, load_peft_weights(path, device=device, subfolder=subfolder, **hub)


def hub_options(given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of hf_hub_download: without None, and with the present name of the token."""
    hub = {k: v for k, v in given.items() if v is not None}
    if "use_auth_token" in hub:
        hub.setdefault("token", hub.pop("use_auth_token"))
    return hub


def local_weights(folder: str | os.PathLike) -> Path | None:
    """The weights file of an adapter folder, if there is one."""
    paths = (current(folder, name) for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME))
    return next((p for p in paths if p.is_file()), None)


def local_config(folder: str | os.PathLike) -> Path:
    """The configuration file of an adapter folder (which may not exist)."""
    return current(folder, CONFIG_NAME)


def load_peft_weights(
    model_id: str | os.PathLike,
    device: str | None = None,
    key_mapping: dict[str, str] | None = None,
    **hf_hub_download_kwargs: Any,
) -> Tensors:
    """Tensors of an adapter in a folder or hub repository, under the keys of the file.

    `device` None: the accelerator if there is one. `key_mapping`: regex -> replacement, for the keys without prefix.
    """
    hub = hub_options(hf_hub_download_kwargs)
    folder = Path(model_id, hub.get("subfolder", ""))
    path = local_weights(folder)
    if path is None and folder.is_dir():
        present = sorted(p.name for p in folder.iterdir())[:10]
        raise ValueError(
            f"Can't find weights for {model_id}: neither {SAFETENSORS_WEIGHTS_NAME} nor {WEIGHTS_NAME} is in {folder}, "
            f"which holds {present}."
        )
    if path is None:
        path = Path(_download(str(model_id), hub))
    if device is None:
        from ..utils.other import infer_device

        device = infer_device()
    on_mps = str(device).startswith("mps")  # no direct reading there
    tensors = read_tensors(path, "cpu" if on_mps else str(device))
    if on_mps:
        tensors = Tensors({k: v.to(device) for k, v in tensors.items()}, tensors.metadata)
    return map_keys(tensors, key_mapping) if key_mapping else tensors


def _download(model_id: str, hub: dict[str, Any]) -> str:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return hf_hub_download(model_id, SAFETENSORS_WEIGHTS_NAME, **hub)
    except EntryNotFoundError:
        try:
            return hf_hub_download(model_id, WEIGHTS_NAME, **hub)
        except LocalEntryNotFoundError:  # the hub could not be asked
            raise
        except EntryNotFoundError as error:
            raise ValueError(
                f"Can't find weights for {model_id} in {model_id} or in the Hugging Face Hub. Please check that the "
                f"file {WEIGHTS_NAME} or {SAFETENSORS_WEIGHTS_NAME} is present at {model_id}."
            ) from error


def map_keys(tensors: Tensors, key_mapping: dict[str, str]) -> Tensors:
    """Rename keys: the first pattern that hits a key (without `base_model.model.`) rewrites it."""
    patterns = [(re.compile(p), r) for p, r in key_mapping.items()]
    mapped = Tensors(metadata=getattr(tensors, "metadata", None))
    for key, value in tensors.items():
        prefix = next((p for p in ("base_model.model.", "base_model.") if key.startswith(p)), None)
        if prefix is None:
            raise ValueError(
                f"An error occurred while trying to load a PEFT state_dict with key_mapping {key_mapping}: the key "
                f"{key!r} should start with 'base_model.model.' or 'base_model.'."
            )
        name = key.removeprefix(prefix)
        for pattern, replacement in patterns:
            name, hits = pattern.subn(replacement, name)
            if hits:
                break
        mapped[prefix + name] = value
    return mapped


# ---- the hub


def check_file_exists_on_hf_hub(repo_id: str, filename: str, **kwargs: Any) -> bool | None:
    """Whether a file is in a repository of the hub; None when that cannot be told (offline, no such repository)."""
    from huggingface_hub import constants, file_exists
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError

    if constants.HF_HUB_OFFLINE:
        return None
    try:
        return file_exists(repo_id, filename, **kwargs)
    except (HFValidationError, EntryNotFoundError):
        return None  # a local path, or no such thing
    except Exception as error:  # network failures of any kind must not stop saving
        warnings.warn(
            f"Unable to fetch remote file due to the following error {error} - silently ignoring the lookup for the "
            f"file {filename} in {repo_id}.",
            stacklevel=2,
        )
        return None


def push_folder(
    save: Callable[..., Any],
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tags: list[str] | None = None,
    repo_type: str | None = None,
    use_temp_dir: bool | None = None,
    max_shard_size: int | str | None = None,
    **save_kwargs: Any,
) -> str:
    """Upload what `save(folder, **save_kwargs)` writes into a temporary folder; returns the address of the commit.

    `use_temp_dir` and `max_shard_size` are accepted for compatibility: the folder is always temporary, an adapter is
    one file.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        save(folder, **save_kwargs)
        if tags:
            _add_tags(Path(folder), tags)
        repo = api.create_repo(repo_id, private=private, repo_type=repo_type, exist_ok=True).repo_id
        if revision is not None and not create_pr and not revision.startswith("refs/"):
            api.create_branch(repo, branch=revision, repo_type=repo_type, exist_ok=True)
        info = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            repo_type=repo_type,
            commit_message=commit_message or "Upload adapter",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )
    return str(info)


def _add_tags(folder: Path, tags: list[str]) -> None:
    from huggingface_hub import ModelCard, ModelCardData

    path = folder / "README.md"
    card = ModelCard.load(path) if path.is_file() else ModelCard.from_template(ModelCardData())
    data: Any = card.data
    data["tags"] = sorted({*(data.get("tags") or []), *tags})
    write_text_atomic(path, str(card))
