"""Files are read to the letter, the hub's failures are one line, and samples are seeded and balanced."""

import csv
import json
import zipfile
from collections import Counter

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from softtune.data import load_records, sample_balanced, split_records
from softtune.data.formats import parse
from softtune.errors import DataError


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


def labelled(**counts):
    labels = [label for label, count in counts.items() for _ in range(count)]
    return datasets.Dataset.from_dict({"Label": labels, "ID": list(range(len(labels)))})


# Reading


def test_csv_keeps_quotes_commas_newlines_and_words_that_look_like_other_types(write):
    path = write("a.csv", 'text,Label\r\n"one, ""two""\r\nthree",NA\r\n 01 ,\r\nnull,1.0\r\n')
    assert load_records(path).to_list() == [
        {"text": 'one, "two"\r\nthree', "Label": "NA"},
        {"text": " 01 ", "Label": ""},
        {"text": "null", "Label": "1.0"},
    ]


def test_tsv_takes_quotes_as_text(write):
    path = write("a.tsv", 'premise\thypothesis\n"He said\tit\'s, "fine""\n')
    assert load_records(path).to_list() == [{"premise": '"He said', "hypothesis": 'it\'s, "fine""'}]


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl"])
def test_byte_order_mark_is_dropped(write, name):
    content = '{"mr": "é"}\n' if name.endswith("jsonl") else "mr\né\n"
    assert load_records(write(name, content.encode("utf-8-sig"))).to_list() == [{"mr": "é"}]


def test_jsonl_keeps_types_line_separators_and_missing_keys(write):
    rows = [{"text": "a\u2028b\u0085c", "refs": ["x", "y"], "n": 1}, {"text": "d", "refs": [], "extra": True}]
    path = write("a.json", "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    assert load_records(path).to_list() == [
        {"text": "a\u2028b\u0085c", "refs": ["x", "y"], "n": 1, "extra": None},
        {"text": "d", "refs": [], "n": None, "extra": True},
    ]


def test_unnamed_first_column_keeps_its_empty_name(write):
    assert load_records(write("a.csv", ",text\n0,hello\n")).column_names == ["", "text"]


def test_ending_may_be_upper_case_and_blank_lines_are_passed_over(write):
    assert load_records(write("A.CSV", "\na,b\n\n1,2\n\n")).to_list() == [{"a": "1", "b": "2"}]


def test_cell_longer_than_the_csv_modules_limit_leaves_that_limit_alone(write):
    limit = csv.field_size_limit()
    assert len(load_records(write("a.csv", "a\n" + "x" * (limit + 1)))[0]["a"]) == limit + 1
    assert csv.field_size_limit() == limit


cells = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=6)


@settings(deadline=None)
@given(st.integers(2, 4).flatmap(lambda n: st.lists(st.lists(cells, min_size=n, max_size=n), min_size=1, max_size=5)))
def test_whatever_rows_are_written_as_csv_come_back(rows):
    header = [f"column {number}" for number in range(len(rows[0]))]
    text = "".join(",".join(f'"{cell}"' for cell in map(_escaped, row)) + "\r\n" for row in [header, *rows])
    assert parse(text.encode(), ".csv") == {name: list(column) for name, *column in zip(header, *rows, strict=True)}


def _escaped(cell):
    return cell.replace('"', '""')


@settings(deadline=None)
@given(st.lists(st.fixed_dictionaries({"a": cells, "b": st.integers() | st.none()}), min_size=1, max_size=5))
def test_whatever_rows_are_written_as_jsonl_come_back(rows):
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    assert parse(text.encode(), ".jsonl") == {"a": [row["a"] for row in rows], "b": [row["b"] for row in rows]}


def test_json_may_be_one_list_of_rows_or_lists_by_split(write):
    assert load_records(write("a.json", '[{"a": 1},\n {"b": "x"}]')).to_list() == [
        {"a": 1, "b": None},
        {"a": None, "b": "x"},
    ]
    path = write("b.json", json.dumps({"train": [["hi", "greet"]], "oos_val": [["a, b", "oos"]]}))
    assert load_records(path, split="oos_val", columns=["text", "intent"]).to_list() == [
        {"text": "a, b", "intent": "oos"}
    ]
    with pytest.raises(DataError, match=r"has no split 'test'; use one of 'train', 'oos_val'"):
        load_records(path, split="test", columns=["text", "intent"])
    assert load_records(write("c.json", '{"refs": ["x"], "tags": ["O"]}')).to_list() == [{"refs": ["x"], "tags": ["O"]}]


def test_words_and_tags_make_sentences(write):
    path = write("a.conll", "\n\nEU NNP B-ORG\nrejects VBZ O\n\n\nA\u2028 b\tO\r\n'\"'\tB-X")
    assert load_records(path).to_list() == [
        {"tokens": ["EU", "rejects"], "tags": ["B-ORG", "O"]},
        {"tokens": ["A\u2028 b", "'\"'"], "tags": ["O", "B-X"]},
    ]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("stsa.binary.dev", "0 one long string\n1 fine , really\r\n"),
        ("a.csv", "0,one long string\n1,'fine , really'\n".replace("'", '"')),
        ("a.tsv", "0\tone long string\n1\tfine , really\n"),
    ],
)
def test_cells_without_a_header_take_the_names_given(write, name, content):
    assert load_records(write(name, content), columns=["label", "text"]).to_list() == [
        {"label": "0", "text": "one long string"},
        {"label": "1", "text": "fine , really"},
    ]


def test_a_header_beside_the_names_is_no_row(write):
    assert load_records(write("a.csv", "a,b\n1,2\na,b\n"), columns=["a", "b"]).to_list() == [
        {"a": "1", "b": "2"},
        {"a": "a", "b": "b"},
    ]


def test_names_that_do_not_fit_are_refused(write):
    with pytest.raises(DataError, match="row 2 has 1 cells and the header 2"):
        load_records(write("lines", "0 a\n1\n"), columns=["label", "text"])
    with pytest.raises(DataError, match=r"a \.jsonl file names its columns itself"):
        load_records(write("a.jsonl", "{}\n"), columns=["label", "text"])
    with pytest.raises(DataError, match="the header has 'a' more than once"):
        load_records(write("a.csv", "1,2\n"), columns=["a", "a"])


def test_files_in_an_archive(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("sets/train.csv", "mr,ref\nname[X],X.\n")
        archive.mkdir("empty")
    source = f"zip://sets/train.csv::{tmp_path}/a.zip"
    assert load_records(source).to_list() == [{"mr": "name[X]", "ref": "X."}]
    with pytest.raises(DataError, match=r"a\.zip has no train\.csv; name one of 'sets/train\.csv'$"):
        load_records(f"zip://train.csv::{tmp_path}/a.zip")
    (tmp_path / "b.zip").write_text("x")
    with pytest.raises(DataError, match=r"b\.zip is no zip archive"):
        load_records(f"zip://train.csv::{tmp_path}/b.zip")
    with pytest.raises(DataError, match=r"there is no file .*c\.zip"):
        load_records(f"zip://train.csv::{tmp_path}/c.zip")


# Refusing


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "", "no rows"),
        ("a.csv", "a,b\n", "no rows"),
        ("a.jsonl", "\n", "no rows"),
        ("a.csv", "a,b\n1,2\n1,2,3\n", "row 2 has 3 cells and the header 2"),
        ("a.tsv", "a\tb\n1\n", "row 1 has 1 cells and the header 2"),
        ("a.csv", 'a,b\n1,2\n"1"x,2\n', "row 2 is malformed"),
        ("a.csv", 'a,b\n1,2\n3,4\n5,"6\n7,8\n', "row 3 is malformed"),
        ("a.csv", "a,b,a\n1,2,3\n", "header has 'a' more than once"),
        ("a.csv", ",,b\n1,2,3\n", "header has '' more than once"),
        ("a.csv", b"a\n\xff\xfe\n", "not UTF-8 at byte 2"),
        ("a.jsonl", '{"a": 1}\n{"a": \n', "row 2 is malformed"),
        ("a.jsonl", '{"a": 1}\n\n[1]\n', "row 2 is a JSON list, not an object"),
        ("a.json", '[\n{"a": 1},\n3]', "row 2 is a JSON int, not an object"),
        ("a.json", '[\n{"a": 1}\n', "row 1 is malformed"),
        ("a.conll", "a\tO\nb\n", "line 2 has no word and tag"),
        ("a.conll", "a\tO\nb\t\n", "line 2 has no word and tag"),
        ("a.jsonl", '{"a": 1}\n{"a": 2.5}\n{"a": "x"}\n', "'a' has a text in row 3 and a number before; give every"),
        ("a.jsonl", '{"a": ["x"]}\n{"a": [["x"]]}\n', "give every column values of one type"),
        ("a.jsonl", f'{{"a": {2**70}}}', "give every column values of one type"),
        ("a.txt", "a", "not a .csv, .tsv, .jsonl, .json, .conll file"),
    ],
)
def test_a_bad_file_is_one_line_with_its_name_and_what_to_do(write, name, content, message):
    path = write(name, content)
    with pytest.raises(DataError, match=message) as caught:
        load_records(path)
    assert path in str(caught.value)
    assert "\n" not in str(caught.value)
    assert ";" in str(caught.value)


@pytest.mark.parametrize("name", ["no such.csv", "no/such.tsv", "such.jsonl"])
def test_missing_file(name, tmp_path):
    with pytest.raises(DataError, match=r"there is no file .*such.*check the path"):
        load_records(str(tmp_path / name))


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(DataError, match=r"cannot read the file \(Is a directory\)"):
        load_records(str(tmp_path))


def test_a_file_has_no_other_split(write):
    with pytest.raises(DataError, match="has no split 'test'"):
        load_records(write("a.csv", "a\n1\n"), split="test")


# The hub


def test_other_names_go_to_the_hub_with_their_split(monkeypatch):
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: asked.append((name, split)) or labelled(x=2))
    assert len(load_records("someone/some-set", split="test")) == 2
    assert asked == [("someone/some-set", "test")]


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (ConnectionError("Couldn't reach the Hub.\nTraceback ..."), "Couldn't reach the Hub;"),
        (ValueError("Config name is missing.\nPlease pick one"), "Config name is missing;"),
        (RuntimeError(), "RuntimeError;"),
    ],
)
def test_the_hubs_failures_are_one_line_with_the_cause(monkeypatch, error, cause):
    def fail(name, split):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match=f"cannot load 'nobody/nothing' .*{cause}") as caught:
        load_records("nobody/nothing")
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is error


# Splitting and sampling


def test_split_is_seeded_and_loses_nothing():
    data = labelled(a=7, b=3)
    train, test = split_records(data, test_size=3, seed=1)
    assert (len(train), len(test)) == (7, 3)
    assert sorted([*train["ID"], *test["ID"]]) == list(range(10))
    assert list(split_records(data, test_size=0.3, seed=1)[1]["ID"]) == list(test["ID"])
    assert list(split_records(data, test_size=3, seed=2)[1]["ID"]) != list(test["ID"])


@pytest.mark.parametrize("test_size", [0, 10, 1.5, -1])
def test_split_of_an_impossible_size(test_size):
    with pytest.raises(DataError, match=f"cannot hold out {test_size} of 10 rows: hold out 1 or more, and leave"):
        split_records(labelled(a=10), test_size=test_size, seed=0)


def test_a_sample_has_no_row_twice_and_a_seed():
    data, shares = labelled(a=30, b=10, c=10), dict.fromkeys("abc", 1 / 3)
    samples = [sample_balanced(data, column="Label", size=20, seed=seed, shares=shares) for seed in (5, 5, 6)]
    assert Counter(samples[0]["Label"]) == {"a": 7, "b": 7, "c": 6}
    one, same, other = (list(sample["ID"]) for sample in samples)
    assert len(set(one)) == 20
    assert one == same
    assert one != other
    assert one != sorted(one)


@pytest.mark.parametrize(
    ("shares", "size", "counts"),
    [
        ({"a": 0.7, "b": 0.3}, 10, {"a": 7, "b": 3}),
        ({"b": 0.29, "a": 0.71}, 100, {"a": 71, "b": 29}),
        ({"a": 0.55, "b": 0.45}, 9, {"a": 5, "b": 4}),
        ({"a": 1.0}, 4, {"a": 4}),
    ],
)
def test_given_shares(shares, size, counts):
    sample = sample_balanced(labelled(a=80, b=80), column="Label", size=size, seed=0, shares=shares)
    assert Counter(sample["Label"]) == counts


@settings(deadline=None, max_examples=25)
@given(st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 50), min_size=1), st.integers(1, 12))
def test_a_sample_has_the_size_asked_for(weights, size):
    shares = {label: weight / sum(weights.values()) for label, weight in weights.items()}
    data = labelled(**dict.fromkeys("abcdef", 12))
    counts = Counter(sample_balanced(data, column="Label", size=size, seed=0, shares=shares)["Label"])
    assert counts.total() == size
    assert all(abs(counts[label] - share * size) < 1 for label, share in shares.items())


def test_labels_that_are_numbers_are_named_as_text():
    data = datasets.Dataset.from_dict({"label": [0, 0, 0, 1, 1]})
    sample = sample_balanced(data, column="label", size=3, seed=0, shares={"0": 1 / 3, "1": 2 / 3})
    assert Counter(sample["label"]) == {0: 1, 1: 2}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 8}, r"'a': 4 wanted, 9 there, 'b': 4 wanted, 3 there"),
        ({"size": 2, "shares": {"a": 0.5, "z": 0.5}}, r"'z': 1 wanted, 0 there"),
        ({"size": 2, "shares": {"a": 0.5}}, "sum to 1"),
        ({"size": 2, "shares": {"a": 1.5, "b": -0.5}}, "0 or more"),
        ({"size": 0}, "a sample of 0 rows"),
        (
            {"size": 2, "column": "label"},
            "no column 'label' in the data, which has 'Label', 'ID'; did you mean 'Label'",
        ),
    ],
)
def test_a_sample_that_cannot_be_drawn(arguments, message):
    with pytest.raises(DataError, match=message):
        sample_balanced(
            labelled(a=9, b=3), **{"column": "Label", "seed": 0, "shares": {"a": 0.5, "b": 0.5}, **arguments}
        )
