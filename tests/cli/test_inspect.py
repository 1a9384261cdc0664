"""`peft inspect` on adapters made by hand."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

from peft import BdLoraConfig, KasaConfig, LoraConfig, get_peft_model
from peft.cli import main
from peft.cli.adapter_files import read_adapter, strengths
from peft.cli.heatmap import html_heatmap, make_grid, svg_spectra, text_heatmap


def lora(r=4, n_in=12, n_out=10, layers=2):
    tensors = {}
    for i in range(layers):
        for name in ("q_proj", "v_proj"):
            tensors[f"model.layers.{i}.self_attn.{name}.lora_A.weight"] = torch.randn(r, n_in)
            tensors[f"model.layers.{i}.self_attn.{name}.lora_B.weight"] = torch.randn(n_out, r)
    return tensors


def test_norm_and_spectrum_are_those_of_the_dense_change(write_adapter):
    tensors = lora() | {"model.layers.0.self_attn.k_proj.lora_A.weight": torch.randn(2, 12),
                        "model.layers.0.self_attn.k_proj.lora_B.weight": torch.randn(10, 2)}  # fmt: skip
    folder = write_adapter({"alpha_pattern": {"layers.1.self_attn.v_proj": 2}, "rank_pattern": {"k_proj": 2}}, tensors)
    found = {layer.module: layer for layer in strengths(read_adapter(str(folder)))}
    assert len(found) == 5
    for module, layer in found.items():
        A, B = tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"]
        alpha = 2 if module.endswith("1.self_attn.v_proj") else 8
        dense = alpha / A.shape[0] * B @ A
        assert layer.norm == pytest.approx(dense.norm().item(), rel=1e-5)
        assert layer.singular_values == pytest.approx(torch.linalg.svdvals(dense)[: A.shape[0]].tolist(), rel=1e-4)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Parameter(torch.randn(3, 6, 8)), nn.Parameter(torch.randn(3, 8, 6))


@pytest.mark.parametrize(
    ("layers", "options"),
    [
        ([Experts()], {"target_modules": [], "target_parameters": ["0.down", "0.up"], "r": 4}),
        ([nn.Linear(8, 12), nn.Linear(12, 6)], {"use_bdlora": BdLoraConfig(["0"], ["1"], nblocks=2)}),
        ([nn.Linear(8, 12)], {"kasa_config": KasaConfig()}),
        ([nn.Conv1d(4, 6, 3)], {"use_rslora": True}),
    ],
    ids=["experts", "blocks", "kasa", "conv"],
)
def test_norms_of_other_forms_are_those_of_the_library(tmp_path, layers, options):
    options = {"r": 2, "lora_alpha": 3, "target_modules": [str(i) for i in range(len(layers))], **options}
    model = get_peft_model(nn.Sequential(*layers), LoraConfig(**options))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()
    model.save_pretrained(tmp_path)
    found = {layer.module: layer for layer in strengths(read_adapter(str(tmp_path)))}
    known = {n: m for n, m in model.base_model.model.named_modules() if hasattr(m, "get_delta_weight")}
    assert found.keys() == known.keys()
    for name, layer in known.items():
        assert found[name].norm == pytest.approx(layer.get_delta_weight("default").norm().item(), rel=1e-5)
        assert found[name].rank == options["r"]


def test_change_of_a_grouped_convolution(write_adapter):
    A, B = torch.randn(4, 6, 3), torch.randn(8, 2, 1)
    folder = write_adapter({}, {"conv.lora_A.weight": A, "conv.lora_B.weight": B})
    (layer,) = strengths(read_adapter(str(folder)))
    x = torch.randn(2, 6, 7)
    expected = nn.functional.conv1d(nn.functional.conv1d(x, A), B, groups=2)
    dense = torch.block_diag(*B.flatten(1).chunk(2)) @ A.flatten(1)
    torch.testing.assert_close(nn.functional.conv1d(x, dense.view(8, 6, 3)), expected)
    assert layer.norm == pytest.approx(2 * dense.norm().item(), rel=1e-5) and layer.rank == 4


def test_experts_of_unknown_ranks_are_shown_by_their_tensors(write_adapter):
    config = {"target_parameters": ["mlp.down", "mlp.up"], "rank_pattern": {"up": 2}}
    A, B = torch.ones(8, 2), torch.zeros(6, 8)
    (layer,) = strengths(read_adapter(str(write_adapter(config, {"mlp.lora_A.weight": A, "mlp.lora_B.weight": B}))))
    assert layer.norm == 4.0 and layer.rank is None


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"lora_A.weight": torch.ones(4, 3)}, r"q has only ['lora_A.weight'], one factor of the pair is missing"),
        ({"lora_A.weight": torch.ones(4, 3), "lora_B.weight": torch.ones(5, 3)}, "q has factors of ranks 4 and 3"),
    ],
)
def test_factors_that_do_not_fit(write_adapter, capsys, tensors, message):
    folder = write_adapter({}, {f"q.{name}": value for name, value in tensors.items()})
    assert main(["inspect", str(folder)]) == 2
    assert message in capsys.readouterr().err


def test_text(write_adapter, capsys):
    folder = write_adapter({"base_model_name_or_path": "some/base", "use_rslora": True}, lora())
    assert main(["inspect", str(folder)]) == 0
    out = capsys.readouterr().out
    for part in ("lora (rank-stabilised)", "some/base", "q_proj", "rank        4", "scaling     4 (alpha 8)", "352 ("):
        assert part in out, part
    rows = [line for line in out.splitlines() if line.startswith("model.layers.")]
    assert [row.split()[0] for row in rows] == ["model.layers.0", "model.layers.1"]
    assert "█" in out


def test_page_is_self_contained_and_well_formed(write_adapter, tmp_path, capsys):
    folder = write_adapter({"base_model_name_or_path": "<b>&"}, lora())
    page = tmp_path / "out" / "page.html"
    assert main(["inspect", str(folder), "--html", str(page)]) == 0
    text = page.read_text()
    assert "&lt;b&gt;&amp;" in text and "<b>&" not in text
    assert not re.search(r'(src|href)="', text) and "<script" not in text
    (grid,), (spectra,) = (
        [ElementTree.fromstring(part) for part in re.findall(f"<{tag}.*?</{tag[:5].strip()}>", text, re.S)]
        for tag in ('table class="heat"', "svg")
    )
    norms = {f"{layer.module}: {layer.norm:.6g}": f"{layer.norm:.3g}" for layer in strengths(read_adapter(str(folder)))}
    cells = [cell for cell in grid.findall(".//td") if cell.text]
    assert {cell.get("title"): cell.text for cell in cells} == norms and len(cells) == 4
    assert all("background:hsl(" in cell.get("style") for cell in cells)
    assert len(spectra.findall(".//{*}polyline")) == 4


def test_another_method_is_shown_by_its_tensors(write_adapter, capsys):
    folder = write_adapter(
        {"peft_type": "IA3", "r": None}, {f"model.layers.{i}.self_attn.k_proj.ia3_l": torch.ones(9) for i in range(3)}
    )
    (layer, *rest) = strengths(read_adapter(str(folder)))
    assert layer.module == "model.layers.0.self_attn.k_proj" and layer.norm == 3.0 and len(rest) == 2
    assert main(["inspect", str(folder)]) == 0
    assert "norm of the adapter's tensors" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("case", "modules"),
    [
        ("ln_tuning_gpt2", {"transformer.h.0.ln_1", "transformer.h.1.ln_1", "transformer.ln_f"}),
        ("delora_llama", {f"model.layers.{i}.self_attn.{name}_proj" for i in range(2) for name in "qv"}),
        ("glora_llama", {f"model.layers.{i}.self_attn.{name}_proj" for i in range(2) for name in "qv"}),
        ("shadow_bert", {"transformer.h.0", "transformer.h.1"}),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_are_counted_for_the_module_they_change(case, modules):
    folder = Path(__file__).parents[1] / "golden" / "cases" / case
    assert {layer.module for layer in strengths(read_adapter(str(folder)))} == modules


def test_values_that_are_not_finite_are_reported(write_adapter, capsys):
    tensors = {"m.layers.0.ia3.ia3_l": torch.tensor([1.0, float("nan")])}
    folder = write_adapter({"peft_type": "IA3"}, tensors)
    assert main(["inspect", str(folder), "--html", str(folder / "p.html")]) == 0
    assert "not finite" in capsys.readouterr().out


def test_grids_split_wide_tables_and_sort_naturally(write_adapter):
    tensors = lora(layers=12) | {
        "lm_head.lora_A.weight": torch.randn(4, 12),
        "lm_head.lora_B.weight": torch.zeros(7, 4),
    }
    grid = make_grid(strengths(read_adapter(str(write_adapter({}, tensors)))))
    assert grid.rows[0] == "" and grid.rows[3:5] == ["model.layers.2", "model.layers.3"]
    narrow = text_heatmap(grid, width=40)
    assert max(map(len, narrow.splitlines())) <= 40 and narrow.count("\n\n") == 1
    assert len(ElementTree.fromstring(html_heatmap(grid)).findall("tr")) == len(grid.rows) + 1
    assert svg_spectra([]) == ""


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: (f / "adapter_config.json").unlink(), "no adapter_config.json"),
        (lambda f: (f / "adapter_config.json").write_text("{"), "not valid JSON"),
        (lambda f: (f / "adapter_config.json").write_text("{}"), "no 'peft_type'"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "neither adapter_model.safetensors"),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"\0" * 30), "Cannot read the adapter weights"),
        (
            lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"),
            "holds pickled objects other than tensors",
        ),
    ],
)
def test_broken_folders(write_adapter, capsys, break_it, message):
    folder = write_adapter({}, lora())
    break_it(folder)
    assert main(["inspect", str(folder)]) == 2
    assert message in capsys.readouterr().err


def test_folder_of_several_adapters_and_missing_folder(write_adapter, tmp_path, capsys):
    write_adapter({}, lora(), "one")
    assert main(["inspect", str(tmp_path)]) == 2
    assert "holds the adapters one" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "none")]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert main(["inspect", "nobody/nothing-here"]) == 2
    assert "hub" in capsys.readouterr().err


def test_old_weight_format(write_adapter, capsys):
    tensors = lora()
    folder = write_adapter({}, tensors)
    (folder / "adapter_model.safetensors").unlink()
    torch.save({f"base_model.model.{k}": v for k, v in tensors.items()}, folder / "adapter_model.bin")
    assert len(strengths(read_adapter(str(folder)))) == 4
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"


def test_dora_is_not_passed_off_as_the_whole_change(write_adapter, capsys):
    assert main(["inspect", str(write_adapter({"use_dora": True}, lora()))]) == 0
    assert "norm of the change before DoRA's scaling, per layer" in capsys.readouterr().out


def test_the_version_is_that_of_the_file(write_adapter, capsys):
    for config, text in (({"peft_version": "0.9.0"}, "peft 0.9.0\n"), ({}, "peft (version not named)\n")):
        assert main(["inspect", str(write_adapter(config, lora(), text))]) == 0
        assert f"written by  {text}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["{tmp}/file"], "is a file, expected a folder"),
        (["{tmp}/list"], "adapter_config.json holds a JSON list, expected an object"),
        (["{tmp}/good", "--html", "{tmp}"], "is a folder, expected a file"),
        (["{tmp}/good", "--html", "{tmp}/file/page.html"], "/file is a file"),
    ],
)
def test_what_is_wrong_is_one_line(write_adapter, tmp_path, capsys, options, message):
    (tmp_path / "file").touch()
    (write_adapter({}, lora(), "list") / "adapter_config.json").write_text("[1]")
    write_adapter({}, lora(), "good")
    assert main(["inspect", *(option.format(tmp=tmp_path) for option in options)]) == 2
    shown = capsys.readouterr()
    assert message in shown.err and shown.err.count("\n") == 1 and not shown.out


def test_width_is_a_number_of_columns(capsys):
    with pytest.raises(SystemExit):
        main(["inspect", "x", "--width", "0"])
    assert "argument --width: expected a positive whole number, got 0" in capsys.readouterr().err
