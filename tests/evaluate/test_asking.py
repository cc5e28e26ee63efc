"""Answers that are kept: what a killed process leaves is read, mended and added to."""

from megatron_vlm.evaluate.asking import Answer, Kept


def test_answers_of_all_processes_are_read_and_a_torn_line_is_none(tmp_path):
    first, second = (Kept(tmp_path / "kept", "vqa.scored.abc", rank) for rank in (0, 1))
    first.add(iter([Answer("a", ("one", "zw\u00f6lf\u2028\n")), Answer("b", fault="no such file")]))
    second.add(iter([Answer("c", ("",))]))
    Kept(tmp_path / "kept", "vqa.scored.abcd").add(iter([Answer("d", ("of another pass",))]))
    path = tmp_path / "kept" / "vqa.scored.abc.0000.jsonl"
    with path.open("ab") as file:
        file.write('{"key": "x", "said": ["\u00e4'.encode()[:-1])
    known = {
        "a": Answer("a", ("one", "zw\u00f6lf\u2028\n")),
        "b": Answer("b", fault="no such file"),
        "c": Answer("c", ("",)),
    }
    assert first.read() == known
    # What was torn is cut off before more is written; an answer wins over a fault, whichever came first.
    first.add(iter([Answer("b", ("now",))]))
    second.add(iter([Answer("b", fault="again")]))
    assert first.read() == known | {"b": Answer("b", ("now",))}
    assert path.read_bytes().count(b"\n") == 3


def test_lines_of_another_form_are_no_answers(tmp_path):
    (tmp_path / "v.0000.jsonl").write_bytes(b'[]\n7\n{"said": []}\nnull\n{"key": "a", "said": 5}\n\xff\n{"key": "b"}\n')
    assert Kept(tmp_path, "v").read() == {"b": Answer("b")}
