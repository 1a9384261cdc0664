"""Reading the user's data, labels, batches."""

import copy
import json

import pytest
import torch

from peft.cli.data import IGNORE, Example, collator, encode, encode_all, load_examples, pair_example, split_examples
from peft.cli.errors import CliError


def lines(path, *records):
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records) + "\n")
    return path


def test_the_three_forms_of_a_record(tmp_path, tokenizer):
    chat = [{"role": "user", "content": "get the file"}, {"role": "assistant", "content": "open the path"}]
    path = lines(
        tmp_path / "d.jsonl",
        {"text": "the value"},
        "",
        {"prompt": "get ", "completion": "the name"},
        {"messages": chat},
    )
    text, pair, talk = load_examples(path, tokenizer, 64)
    assert text == Example((("the value", True),))
    assert pair == pair_example("get ", "the name")
    assert talk.spans == (("<|user|> get the file<end><|assistant|> ", False), ("open the path<end>", True))
    ids = encode(talk, tokenizer)
    assert tokenizer.decode([i for i in ids["labels"] if i != IGNORE]) == "open the path <end>"


def test_labels_cover_completion_and_end(tokenizer):
    row = encode(pair_example("get the file", "open the path"), tokenizer)
    assert row["labels"][:3] == [IGNORE] * 3
    assert row["labels"][3:] == row["input_ids"][3:] and row["input_ids"][-1] == tokenizer.eos_token_id
    assert len(row["input_ids"]) == 7


def test_what_is_left_out_and_what_is_cut_off(tokenizer):
    examples = [pair_example(prompt, answer) for prompt, answer in (("the " * 9, "name"), ("the", "name " * 6))]
    for answer, cut in (("name " * 6, 0), ("name " * 7, 1)):  # with the end of text 8 and 9 tokens
        examples[1] = pair_example("the", answer)
        kept, *counts = encode_all(examples, tokenizer, 8)
        assert counts == [1, cut] and [len(row["input_ids"]) for row in kept] == [8]


@pytest.mark.parametrize("indent", [None, 1])
def test_a_json_file_may_be_one_list(tmp_path, tokenizer, indent):
    path, records = tmp_path / "d.json", [{"text": "the value"}, {"prompt": "get", "completion": "name"}]
    path.write_text(json.dumps(records, indent=indent))
    assert load_examples(path, tokenizer, 64) == [Example((("the value", True),)), pair_example("get", "name")]
    path.write_text(json.dumps([*records, {"txt": "a"}], indent=indent))
    with pytest.raises(CliError, match="entry 3: expected 'text'.*did you mean 'text'"):
        load_examples(path, tokenizer, 64)
    path.write_text(json.dumps(records, indent=1)[:-9])
    with pytest.raises(CliError, match=r"d.json:7: not valid JSON: .* at column \d+$"):
        load_examples(path, tokenizer, 64)


def test_a_byte_order_mark_and_separators_inside_of_texts(tmp_path, tokenizer):
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "the\u2028value"}\r\n{"text": "na\u00efve"}\r\n', encoding="utf-8-sig", newline="")
    assert [e.spans[0][0] for e in load_examples(path, tokenizer, 64)] == ["the\u2028value", "na\u00efve"]


def test_two_assistant_turns_are_both_learned(tmp_path, tokenizer):
    turns = [("user", "get"), ("assistant", "open"), ("user", "set"), ("assistant", "close")]
    path = lines(tmp_path / "d.jsonl", {"messages": [{"role": r, "content": c} for r, c in turns]})
    row = encode(load_examples(path, tokenizer, 64)[0], tokenizer)
    learned = tokenizer.decode([i for i in row["labels"] if i != IGNORE])
    assert learned == "open <end> close <end>"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("{broken", "not valid JSON"),
        ("{", "(each line is one object)"),
        ("[1]", "expected a JSON object, got list"),
        ({"txt": "a"}, "did you mean 'text'?"),
        ({"text": 3}, "'text' must be text"),
        ({"prompt": "a", "completion": ""}, "'completion' not empty"),
        ({"messages": [{"role": "user", "content": "a"}]}, "at least one role 'assistant'"),
        ({"messages": "a"}, "must be a list"),
    ],
)
def test_a_broken_line_names_file_and_line(tmp_path, tokenizer, record, message):
    path = lines(tmp_path / "d.jsonl", {"text": "the value"}, record)
    with pytest.raises(CliError) as error:
        load_examples(path, tokenizer, 64)
    assert str(error.value).startswith(f"{path}:2: ") and message in str(error.value)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "the model's tokenizer has no chat template, use 'prompt' and 'completion' instead"),
        ("{{ messages[-1]['content'] }}", "the chat template rewrites earlier turns; give one assistant turn"),
    ],
)
def test_templates_that_conversations_cannot_use(tmp_path, tokenizer, template, message):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    chat = [{"role": r, "content": c} for r, c in (("user", "get"), ("assistant", "open"))]
    path = lines(tmp_path / "d.jsonl", {"messages": chat})
    with pytest.raises(CliError, match=f"d.jsonl:1: {message}"):
        load_examples(path, tokenizer, 64)


def test_an_end_that_the_tokenizer_adds_comes_once(tokenizer):
    from tokenizers.processors import TemplateProcessing

    plain, tokenizer = tokenizer, copy.deepcopy(tokenizer)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("$A <end>", special_tokens=[("<end>", 1)])
    example = pair_example("get the file", "open the path")
    assert tokenizer("get")["input_ids"][-1] == tokenizer.eos_token_id
    assert encode(example, tokenizer) == encode(example, plain)


def test_text_file_becomes_blocks(tmp_path, tokenizer):
    path = tmp_path / "d.txt"
    path.write_text("the value of\na file\nlist name or path\nto set get\n")
    blocks = load_examples(path, tokenizer, 5)
    assert [b.spans[0][0] for b in blocks] == ["the value of\na file\n", "list name or path\n", "to set get\n"]


def test_a_long_line_loses_nothing(tmp_path, tokenizer):
    path = tmp_path / "d.txt"
    path.write_text("the value of a file list name or path to set get\nopen\n")
    blocks = [b.spans[0][0] for b in load_examples(path, tokenizer, 5)]
    assert blocks == ["the value of a file", " list name or path to", " set get\nopen\n"]


@pytest.mark.parametrize(
    ("name", "content"), [("d.csv", "a"), ("d.jsonl", ""), ("d.txt", " "), ("d.txt", b"\xff\xfe\xff")]
)
def test_unusable_files(tmp_path, tokenizer, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CliError, match=name):
        load_examples(path, tokenizer, 8)


def test_split_is_seeded_and_never_empty():
    examples = [pair_example(str(i), "x") for i in range(20)]
    train, held_out = split_examples(examples, 0.1, 3)
    assert len(held_out) == 2 and sorted(map(str, train + held_out)) == sorted(map(str, examples))
    assert split_examples(examples, 0.1, 3) == (train, held_out) != split_examples(examples, 0.1, 4)
    assert len(split_examples(examples[:2], 0.01, 0)[1]) == 1
    with pytest.raises(CliError, match="two examples"):
        split_examples(examples[:1], 0.1, 0)


def test_both_paddings_give_the_same_loss(model_folder, tokenizer):
    """Logits only for learned positions, flush right, must change no number."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    examples = [pair_example("get the", "open a list of"), pair_example("set a path to the file name", "none"),
                pair_example("", "value or item")]  # fmt: skip
    rows, *_ = encode_all(examples, tokenizer, 64)
    full, short = (collator(tokenizer.pad_token_id, last_logits_only=flag)(rows) for flag in (False, True))
    with torch.no_grad():
        a, b = model(**full), model(**short)
    assert b.logits.shape[1] == len(short["logits_to_keep"]) == short["labels"].shape[1] <= a.logits.shape[1]
    assert a.loss.item() == pytest.approx(b.loss.item(), abs=1e-6)
    later = collator(tokenizer.pad_token_id, last_logits_only=True)(rows[:2])
    assert len(later["logits_to_keep"]) < later["input_ids"].shape[1]
    with torch.no_grad():
        full = collator(tokenizer.pad_token_id, last_logits_only=False)(rows[:2])
        assert model(**full).loss.item() == pytest.approx(model(**later).loss.item(), abs=1e-6)
