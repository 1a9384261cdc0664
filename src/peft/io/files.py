# SPDX-License-Identifier: Apache-2.0
"""Adapter files: reading and writing folders and hub repositories.

Files are written to a temporary name in the same folder, flushed to disk and renamed: whoever reads sees the old file or the new one. An
adapter is two files, so `save_adapter` writes both temporaries first and then renames weights before configuration; a reader that was
killed in between finds the new weights with the old configuration, which differ only where the adapter's shape changed, and then loading
says so. Pickles are read with `weights_only=True`.
"""

import contextlib
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ..config import CONFIG_NAME, PeftConfig

WEIGHTS_NAME = "adapter_model.bin"
SAFETENSORS_WEIGHTS_NAME = "adapter_model.safetensors"


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary file next to `path` that takes its place when the block ends without error."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        _flush(temporary)
        _match_umask(temporary)
        os.replace(temporary, path)
        _flush_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _match_umask(path: Path) -> None:
    """mkstemp makes private files; saved files get the usual permissions."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def write_text_atomic(path: str | os.PathLike, text: str) -> None:
    """Write a text file so that readers see the old content or the new one."""
    with _replacing(Path(path)) as temporary:
        temporary.write_text(text, encoding="utf-8")


def save_safetensors_atomic(path: str | os.PathLike, tensors: Mapping[str, torch.Tensor], metadata: dict | None = None) -> None:
    from safetensors.torch import save_file

    with _replacing(Path(path)) as temporary:
        save_file(split_shared(tensors), temporary, metadata={"format": "pt", **(metadata or {})})


def split_shared(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous tensors of which no two share storage: safetensors stores each name by itself."""
    seen: set[tuple] = set()
    out = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        identity = (tensor.device, storage.data_ptr(), storage.nbytes())
        shared = identity in seen and storage.nbytes() > 0
        seen.add(identity)
        partial = storage.nbytes() != tensor.numel() * tensor.element_size()
        out[name] = tensor.detach().clone().contiguous() if shared or partial else tensor.detach().contiguous()
    return out


def save_adapter(folder: str | os.PathLike, state: Mapping[str, torch.Tensor], config: PeftConfig, *, safe_serialization: bool = True) -> None:
    """Write one adapter: weights, then configuration; a previous adapter stays whole until both are on disk.

    The weight file of the other format is removed, as it would be read first or be out of date.
    """
    folder = Path(folder)
    name, other = (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME) if safe_serialization else (WEIGHTS_NAME, SAFETENSORS_WEIGHTS_NAME)
    with _replacing(folder / CONFIG_NAME) as new_config:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".config-") as scratch:
            config.save_pretrained(scratch)
            new_config.write_bytes(Path(scratch, CONFIG_NAME).read_bytes())
        if safe_serialization:
            save_safetensors_atomic(folder / name, state)
        else:
            with _replacing(folder / name) as temporary:
                torch.save(dict(state), temporary)
    (folder / other).unlink(missing_ok=True)


# ---- reading
def load_peft_weights(
    model_id: str | os.PathLike, device: str | None = None, key_mapping: dict[str, str] | None = None, **hf_hub_download_kwargs: Any
) -> dict[str, torch.Tensor]:
    """The tensors of an adapter, from a folder or a hub repository, by their file keys.

    `key_mapping` {regex: replacement} renames the part after `base_model.model.`.
    """
    from ..utils.other import infer_device

    device = device or infer_device()
    path = find_weights(str(model_id), hf_hub_download_kwargs)
    tensors = read_weights(path, device)
    return _renamed(tensors, key_mapping) if key_mapping else tensors


def find_weights(model_id: str, hub: dict[str, Any]) -> Path:
    """Path of the weight file: local folder first, then the hub's cache or the hub."""
    hub = dict(hub)
    subfolder = hub.pop("subfolder", None)
    folder = Path(model_id, subfolder) if subfolder else Path(model_id)
    for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME):
        if (folder / name).is_file():
            return folder / name
    if folder.is_dir():
        present = sorted(p.name for p in folder.iterdir())[:10]
        raise ValueError(f"Can't find weights in {folder}: neither {SAFETENSORS_WEIGHTS_NAME} nor {WEIGHTS_NAME} is there, only {present}.")
    return _from_hub(model_id, subfolder, hub)


def _from_hub(model_id: str, subfolder: str | None, hub: dict[str, Any]) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    hub = {k: v for k, v in hub.items() if k != "use_auth_token"} | ({"token": hub["use_auth_token"]} if hub.get("use_auth_token") else {})
    prefix = f"{subfolder}/" if subfolder else ""
    error: Exception | None = None
    for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME):
        try:
            return Path(huggingface_hub.hf_hub_download(model_id, prefix + name, **hub))
        except LocalEntryNotFoundError:
            if name == WEIGHTS_NAME:
                raise
        except EntryNotFoundError as exc:
            error = exc
    raise ValueError(
        f"Can't find weights for {model_id} in {model_id} or in the Hugging Face Hub. Please check that the file {WEIGHTS_NAME} or "
        f"{SAFETENSORS_WEIGHTS_NAME} is present at {model_id}."
    ) from error


def read_weights(path: str | os.PathLike, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Read one weight file. A damaged file or a pickle with code in it gives a ValueError that names it."""
    path = Path(path)
    target = "cpu" if str(device).startswith("mps") else str(device)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            tensors = load_file(path, device=target)
        else:
            tensors = torch.load(path, map_location=target, weights_only=True)
    except Exception as exc:
        raise ValueError(f"Can't read adapter weights from {path}: the file is damaged or no adapter file ({type(exc).__name__}: {exc})") from exc
    if not isinstance(tensors, dict) or not all(isinstance(v, torch.Tensor) for v in tensors.values()):
        raise ValueError(f"{path} does not hold a dict of tensors; it is no adapter file.")
    return {k: v.to(device) for k, v in tensors.items()} if target != str(device) else tensors


def _renamed(tensors: dict[str, torch.Tensor], key_mapping: dict[str, str]) -> dict[str, torch.Tensor]:
    out = {}
    for key, value in tensors.items():
        prefix = next((p for p in ("base_model.model.", "base_model.") if key.startswith(p)), None)
        if prefix is None:
            raise ValueError(f"An error occurred while trying to map the state dict key {key!r}: it does not start with 'base_model.'.")
        rest = key.removeprefix(prefix)
        for pattern, replacement in key_mapping.items():
            changed, hits = re.subn(pattern, replacement, rest)
            if hits:
                rest = changed
                break
        out[prefix + rest] = value
    return out


def read_adapter(path: str | os.PathLike) -> tuple[PeftConfig, dict[str, torch.Tensor]]:
    """Configuration and tensors (by file key, on the CPU) of an adapter folder."""
    return PeftConfig.from_pretrained(path), read_weights(find_weights(str(path), {}))


# ---- the hub
def check_file_exists_on_hf_hub(repo_id: str, filename: str, **kwargs: Any) -> bool | None:
    """Whether the hub has the file; None when that cannot be found out (offline, no such repository)."""
    from huggingface_hub import constants, file_exists
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError

    if constants.HF_HUB_OFFLINE:
        return None
    try:
        return file_exists(repo_id, filename, **kwargs)
    except (HFValidationError, EntryNotFoundError):
        return None
    except Exception as exc:
        warnings.warn(f"Unable to fetch remote file due to the following error {exc} - silently ignoring the lookup for the file {filename} in {repo_id}.", stacklevel=2)
        return None


def push_folder(save: Callable[..., Any], repo_id: str, **kwargs: Any) -> str:
    """Save into a temporary folder and upload it; returns the URL of the commit."""
    from huggingface_hub import HfApi

    api = HfApi(token=kwargs.pop("token", None))
    options = {k: kwargs.pop(k) for k in ("commit_message", "revision", "create_pr", "commit_description") if k in kwargs}
    private = kwargs.pop("private", None)
    with tempfile.TemporaryDirectory() as folder:
        save(folder, **kwargs)
        repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        options.setdefault("commit_message", "Upload adapter")
        return str(api.upload_folder(repo_id=repo, folder_path=folder, **options))


