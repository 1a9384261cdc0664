# SPDX-License-Identifier: Apache-2.0
"""Files: atomic writing under kill -9, damaged and hostile files, the hub's cache."""

import json
import os
import signal
import struct
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors.torch import save_file

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, load_peft_weights
from peft.io import atomic
from peft.io.files import check_file_exists_on_hf_hub, read_adapter, save_adapter, split_shared, write_text_atomic
from peft.utils.error import AdapterFileError

from .models import fill, net

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def make(rank: int) -> tuple[dict[str, torch.Tensor], LoraConfig]:
    """An adapter whose configuration, shapes and values all say its rank."""
    tensors = {f"base_model.model.lin{i}.lora_A.weight": torch.full((rank, 64), float(rank)) for i in range(4)}
    return tensors, LoraConfig(r=rank, target_modules=["lin"])


def rank_of(folder: Path) -> int:
    """The rank of the adapter in a folder; fails when its parts are of different adapters."""
    config, tensors = read_adapter(folder)
    assert len(tensors) == 4
    for tensor in tensors.values():
        assert tensor.shape == (config.r, 64)
        assert bool((tensor == config.r).all())
    return config.r


# ---- kill -9
_EVERY_STEP = """
import os, sys
from pathlib import Path
from peft.io import atomic
from tests_io_make import make
from peft.io.files import save_adapter

folder, step, safe = Path(sys.argv[1]), 0, sys.argv[2] == "safe"

def crash_at(limit):
    '''In a child: save rank 8 and die without any clean-up at the limit-th change of the file system.'''
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0
    seen = 0
    def counted(function):
        def call(*args, **kwargs):
            nonlocal seen
            for half in ("before", "after"):
                seen += 1
                if seen == limit:
                    os._exit(9)
                if half == "before":
                    result = function(*args, **kwargs)
            return result
        return call
    for name in ("rename", "replace", "unlink", "rmdir", "mkdir", "fsync"):
        setattr(os, name, counted(getattr(os, name)))
    save_adapter(folder, *make(8), safe_serialization=safe)
    os._exit(0)

while True:
    save_adapter(folder, *make(4), safe_serialization=True)
    step += 1
    if not crash_at(step):
        break
    print(rank_of(folder))
print("steps", step)
assert rank_of(folder) == 8
save_adapter(folder, *make(4))
print(sorted(os.listdir(folder)))
"""

_RANDOM = """
import os, random, signal, sys, time
from pathlib import Path
from peft.io.files import save_adapter

folder, rounds = Path(sys.argv[1]), int(sys.argv[2])
random.seed(0)
save_adapter(folder, *make(4))
seen = set()
for _ in range(rounds):
    pid = os.fork()
    if pid == 0:
        while True:
            for rank in (8, 4):
                save_adapter(folder, *make(rank))
    time.sleep(random.uniform(0.002, 0.05))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    seen.add(rank_of(folder))
print(sorted(seen))
"""


def run(script: str, *args: str) -> list[str]:
    import inspect

    helpers = "import torch\nfrom peft import LoraConfig\nfrom peft.io.files import read_adapter\n"
    helpers += inspect.getsource(make) + "\n" + inspect.getsource(rank_of)
    script = helpers.replace("(folder: Path)", "(folder)") + script.replace("from tests_io_make import make\n", "")
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script, *args], capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("kind", ["safe", "bin"])
def test_dying_at_every_step_leaves_the_old_or_the_new_adapter(tmp_path, kind):
    *ranks, steps, left = run(_EVERY_STEP, str(tmp_path), kind)
    ranks = [int(r) for r in ranks]
    assert len(ranks) > 10
    assert set(ranks) == {4, 8}
    assert ranks == sorted(ranks)  # once valid, the new one stays valid
    assert left == str([CONFIG, WEIGHTS])  # nothing of the dead processes is left
    assert steps


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kill_9_at_random_moments(tmp_path):
    assert run(_RANDOM, str(tmp_path), "40")[0] in ("[4, 8]", "[4]", "[8]")


def test_read_only_folder_with_an_unfinished_save(tmp_path, monkeypatch):
    """The pending files count even where they cannot be moved into place."""
    save_adapter(tmp_path, *make(4))
    monkeypatch.setattr(atomic, "recover", lambda folder: None)
    save_adapter(tmp_path, *make(8))
    assert (tmp_path / atomic.PENDING).is_dir()
    assert rank_of(tmp_path) == 8
    assert json.loads((tmp_path / CONFIG).read_text())["r"] == 4
    monkeypatch.undo()
    assert rank_of(tmp_path) == 8
    assert sorted(os.listdir(tmp_path)) == [CONFIG, WEIGHTS]


def test_failing_save_keeps_the_old_adapter(tmp_path):
    save_adapter(tmp_path, *make(4))
    tensors, config = make(8)
    tensors["base_model.model.lin3.lora_A.weight"] = torch.empty(8, 64, device="meta")
    with pytest.raises(RuntimeError, match=r"lin3.lora_A.weight.*meta device"):
        save_adapter(tmp_path, tensors, config)
    assert rank_of(tmp_path) == 4
    assert sorted(os.listdir(tmp_path)) == [CONFIG, WEIGHTS]


def test_the_other_format_is_removed(tmp_path):
    save_adapter(tmp_path, *make(4), safe_serialization=False)
    assert sorted(os.listdir(tmp_path)) == [CONFIG, "adapter_model.bin"]
    assert rank_of(tmp_path) == 4
    save_adapter(tmp_path, *make(8))
    assert sorted(os.listdir(tmp_path)) == [CONFIG, WEIGHTS]
    save_adapter(tmp_path, *make(4), safe_serialization=False)
    assert rank_of(tmp_path) == 4


def test_text_and_tensors_in_one_step(tmp_path):
    path = tmp_path / "a.txt"
    write_text_atomic(path, "old")
    with pytest.raises(ZeroDivisionError), atomic.replaced(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    write_text_atomic(path, "neu é\n")
    assert path.read_bytes() == "neu é\n".encode()
    assert os.listdir(tmp_path) == ["a.txt"]


def test_shared_storage_is_split():
    a = torch.arange(6.0)
    split = split_shared(
        {"a": a, "b": a.view(2, 3), "c": a[:3], "d": torch.ones(2), "e": torch.empty(0), "f": torch.empty(0)}
    )
    assert split["a"].data_ptr() == a.data_ptr()
    assert len({t.data_ptr() for t in split.values() if t.numel()}) == 4
    assert torch.equal(split["b"], a.view(2, 3))
    assert torch.equal(split["c"], a[:3])


# ---- what save_pretrained writes
def test_saved_files(tmp_path):
    model = get_peft_model(net(), LoraConfig(r=2, target_modules=["lin0"]))
    model.add_adapter("second", LoraConfig(r=3, target_modules=["a"]))
    model.save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["README.md", CONFIG, WEIGHTS, "second"]
    assert sorted(os.listdir(tmp_path / "second")) == [CONFIG, WEIGHTS]
    from safetensors import safe_open

    with safe_open(tmp_path / WEIGHTS, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(get_peft_model_state_dict(model))
    config, tensors = read_adapter(tmp_path, subfolder="second")
    assert config.r == 3
    assert [tuple(t.shape) for t in tensors.values()] == [(3, 8), (8, 3)]


# ---- damaged and hostile files
@pytest.fixture
def folder(tmp_path):
    model = get_peft_model(net(), LoraConfig(r=2, target_modules=["lin0", "a"], init_lora_weights=False))
    model.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("keep", [0, 5, 8, 60, 400, -1])
def test_truncated_safetensors(folder, keep):
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:keep])
    base = net()
    before = base.state_dict()
    with pytest.raises(AdapterFileError, match=r"adapter_model\.safetensors.*truncated") as error:
        PeftModel.from_pretrained(base, folder)
    assert f"{path.stat().st_size:,} bytes" in str(error.value)
    assert base.state_dict().keys() == before.keys()
    assert isinstance(error.value, ValueError)


def test_pickle_called_safetensors(folder):
    torch.save({"a": torch.ones(2)}, folder / WEIGHTS)
    with pytest.raises(AdapterFileError, match=r"is a pickle.*adapter_model\.bin"):
        load_peft_weights(folder)
    (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(AdapterFileError, match="git-lfs pointer"):
        load_peft_weights(folder)
    (folder / WEIGHTS).write_bytes(b"\xff" * 100)
    with pytest.raises(AdapterFileError, match="no safetensors file"):
        load_peft_weights(folder)


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("evil",))


def test_pickle_with_code_is_refused(folder, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / WEIGHTS).unlink()
    torch.save({"a": torch.ones(2), "b": Evil()}, folder / "adapter_model.bin")
    with pytest.raises(AdapterFileError, match=r"Refusing to load.*adapter_model\.bin"):
        PeftModel.from_pretrained(net(), folder)
    assert not (folder / "evil").exists()


@pytest.mark.parametrize("content", [{"a": 1}, [torch.ones(2)], torch.ones(2)])
def test_bin_without_tensors(folder, content):
    (folder / WEIGHTS).unlink()
    torch.save(content, folder / "adapter_model.bin")
    with pytest.raises(AdapterFileError, match="expected a dict of tensors"):
        load_peft_weights(folder)


def test_truncated_bin(folder):
    (folder / WEIGHTS).unlink()
    path = folder / "adapter_model.bin"
    torch.save({"a": torch.ones(200)}, path)
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(AdapterFileError, match="300 bytes"):
        load_peft_weights(folder)


def test_folder_without_weights_names_what_is_there(folder):
    (folder / WEIGHTS).rename(folder / "weights.safetensors")
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors nor adapter_model\.bin.*weights\.safetensors"):
        load_peft_weights(folder)


# ---- options of reading
def test_key_mapping(folder):
    plain = load_peft_weights(folder, device="cpu")
    mapped = load_peft_weights(folder, device="cpu", key_mapping={r"^lin(\d)": r"layer.\1", r"lora_A": "never second"})
    assert {k.replace("lin0", "layer.0") for k in plain if "lin0" in k} < set(mapped)
    assert "base_model.model.block.a.never second.weight" in mapped
    save_file({"lin0.lora_A.weight": torch.ones(1)}, folder / WEIGHTS)
    with pytest.raises(ValueError, match=r"'lin0\.lora_A\.weight' should start with"):
        load_peft_weights(folder, key_mapping={"a": "b"})


def test_subfolder_and_bin(folder):
    model = get_peft_model(net(), LoraConfig(r=2, target_modules=["lin0"]), adapter_name="x")
    fill(model, "x")
    model.save_pretrained(folder, safe_serialization=False)
    assert (folder / "x" / "adapter_model.bin").is_file()
    found = load_peft_weights(folder, device="cpu", subfolder="x")
    expected = get_peft_model_state_dict(model, adapter_name="x")
    assert all(torch.equal(found[k], v) for k, v in expected.items())


_OFFLINE = """
import sys, torch
from peft import PeftConfig, load_peft_weights
from huggingface_hub.errors import LocalEntryNotFoundError
print(PeftConfig.from_pretrained("someone/thing").r, sorted(load_peft_weights("someone/thing", device="cpu")))
try:
    load_peft_weights("someone/else", device="cpu")
except LocalEntryNotFoundError:
    print("not in the cache")
"""


@pytest.mark.parametrize("name", [WEIGHTS, "adapter_model.bin"])
def test_offline_uses_the_cache(tmp_path, name):
    cache = tmp_path / "hub" / "models--someone--thing"
    snapshot = cache / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc")
    save_adapter(snapshot, *make(4), safe_serialization=name == WEIGHTS)
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub"), "OMP_NUM_THREADS": "1"}
    script = textwrap.dedent(_OFFLINE)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0, done.stderr[-1500:]
    keys = sorted(make(4)[0])
    assert done.stdout.splitlines() == [f"4 {keys}", "not in the cache"]


def test_config_of_an_unfinished_save_is_the_new_one(tmp_path, monkeypatch):
    save_adapter(tmp_path, *make(4))
    monkeypatch.setattr(atomic, "recover", lambda folder: None)
    save_adapter(tmp_path, *make(8))
    monkeypatch.undo()
    assert PeftConfig.from_pretrained(tmp_path).r == 8
    assert signal.SIGKILL == 9


def test_a_save_that_meets_another_one(tmp_path):
    """Its files count, then the new ones; a file in the place of the folder is nobody's save."""
    with atomic.transaction(tmp_path) as new:
        (new / "a").write_text("second")
        (tmp_path / atomic.PENDING).mkdir()
        (tmp_path / atomic.PENDING / "a").write_text("first")
        (tmp_path / atomic.PENDING / "b").write_text("first")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a": "second", "b": "first"}
    (tmp_path / atomic.PENDING).write_text("in the way")
    with pytest.raises(RuntimeError, match=r"adapter_pending is in the way"), atomic.transaction(tmp_path) as new:
        (new / "a").write_text("third")
    assert (tmp_path / "a").read_text() == "second"


def test_a_folder_that_cannot_be_written_is_read_as_it_should_be(tmp_path, monkeypatch):
    pending = tmp_path / atomic.PENDING
    pending.mkdir()
    for name in ("old.bin", "kept"):
        (tmp_path / name).write_text("old")
    (pending / "remove--old.bin").touch()

    def refused(*args, **kwargs):
        raise PermissionError

    monkeypatch.setattr(atomic.os, "access", lambda *args: False)
    monkeypatch.setattr(atomic.Path, "unlink", refused)
    assert not atomic.current(tmp_path, "old.bin").exists()
    assert atomic.current(tmp_path, "kept").read_text() == "old"
    monkeypatch.setattr(atomic.os, "access", lambda *args: True)
    with pytest.raises(PermissionError):
        atomic.current(tmp_path, "kept")


def test_only_what_dead_processes_of_this_machine_left_is_removed(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    here, there = atomic._host(), "0" * 8
    kept = {f".adapter_new.{there}.{dead.pid}.aa", f".adapter_config.json.{there}.{dead.pid}.aa.tmp"}
    kept |= {f".adapter_new.{here}.{os.getpid()}.aa", f".adapter_config.json.{here}.1.aa.tmp", ".x.tmp"}
    lost = {f".adapter_new.{here}.{dead.pid}.aa", f".README.md.{here}.{dead.pid}.aa.tmp"}
    for name in kept | lost:
        (tmp_path / name).mkdir() if "adapter_new" in name else (tmp_path / name).touch()
    with atomic.transaction(tmp_path) as new:
        (new / "a").touch()
    assert set(os.listdir(tmp_path)) == kept | {"a"}


def test_weights_can_be_saved_by_torch(folder):
    tensors = load_peft_weights(folder, device="cpu")
    torch.save(tensors, folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
    again = load_peft_weights(folder, device="cpu")
    assert again.keys() == tensors.keys() and all(torch.equal(again[k], v) for k, v in tensors.items())


def test_numbers_at_odd_places(tmp_path):
    """Other writers need not pad the header."""
    header = b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}} '
    assert len(header) % 4
    (tmp_path / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + struct.pack("<2f", 1.5, -2))
    assert load_peft_weights(tmp_path, device="cpu")["x"].tolist() == [1.5, -2.0]


# ---- the hub
class Hub:
    """What huggingface_hub's download finds: file names in a repository, or an exception instead."""

    def __init__(self, monkeypatch, folder, *names, error=None):
        self.folder, self.names, self.error, self.asked = folder, names, error, []
        monkeypatch.setattr("huggingface_hub.hf_hub_download", self)

    def __call__(self, repo, name, **options):
        self.asked.append((repo, name, options))
        if name in self.names:
            return str(self.folder / name)
        raise self.error or EntryNotFoundError("404")


@pytest.mark.parametrize("name", [WEIGHTS, "adapter_model.bin"])
def test_hub_options_reach_every_download(folder, monkeypatch, name):
    if name != WEIGHTS:
        torch.save(load_peft_weights(folder, device="cpu"), folder / name)
    hub = Hub(monkeypatch, folder, CONFIG, name)
    model = PeftModel.from_pretrained(net(), "org/thing", use_auth_token="secret", revision="v1", subfolder=None)
    assert {asked for asked, *_ in hub.asked} == {"org/thing"}
    assert {n for _, n, _ in hub.asked} == {CONFIG, WEIGHTS, name}
    assert all((o["token"], o["revision"]) == ("secret", "v1") for *_, o in hub.asked)
    state = get_peft_model_state_dict(model)
    assert all(torch.equal(state[k], v) for k, v in load_peft_weights(folder, device="cpu").items())


def test_hub_without_weights(folder, monkeypatch):
    Hub(monkeypatch, folder, CONFIG)
    with pytest.raises(ValueError, match=r"org/thing.*adapter_model\.bin or adapter_model\.safetensors is present"):
        load_peft_weights("org/thing", device="cpu")
    Hub(monkeypatch, folder, CONFIG, error=LocalEntryNotFoundError("no connection"))
    with pytest.raises(LocalEntryNotFoundError, match="no connection"):
        load_peft_weights("org/thing", device="cpu")


def test_uploads_with_tags_and_to_a_branch(monkeypatch, tmp_path):
    calls = []

    class Api:
        def __init__(self, token):
            calls.append(("token", token))

        def create_repo(self, repo, **options):
            return SimpleNamespace(repo_id="me/" + repo)

        def create_branch(self, repo, **options):
            calls.append(("branch", repo, options["branch"]))

        def upload_folder(self, *, folder_path, revision, commit_message, **options):
            calls.append(("upload", sorted(os.listdir(folder_path)), revision, commit_message))
            card = Path(folder_path, "README.md")
            calls.append(ModelCard.load(card).data.tags if card.is_file() else None)
            return "address"

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    model = get_peft_model(net(), LoraConfig(r=2, target_modules=["lin0"]))
    assert model.push_to_hub("x", tags=["b", "a"], revision="new", token="t") == "address"
    assert calls[:2] == [("token", "t"), ("branch", "me/x", "new")]
    assert calls[2] == ("upload", ["README.md", CONFIG, WEIGHTS], "new", "Upload adapter")
    assert calls[3] == ["a", "b", "lora"]
    calls.clear()
    LoraConfig().push_to_hub("x", commit_message="mine", revision="refs/pr/1")
    assert calls == [("token", None), ("upload", [CONFIG], "refs/pr/1", "mine"), None]


def test_a_lookup_that_fails_says_so(monkeypatch):
    def file_exists(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.file_exists", file_exists)
    with pytest.warns(UserWarning, match="no route - silently ignoring the lookup for the file a in org/thing"):
        assert check_file_exists_on_hf_hub("org/thing", "a") is None
