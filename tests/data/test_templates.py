"""Texts are tokenized as a whole would be; only fields are cut; the answer is whole and alone in the labels."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from softtune.data import Example, Template, Verbalizer, encode
from softtune.errors import DataError

CORPUS = [
    "Tweet text : my order never came and nobody answers Label : complaint",
    "Tweet text : thanks for the quick help, it's great! Label : no complaint",
    "premise : the cat sat on the mat hypothesis : a cat sat entails : yes no maybe",
]
LONG = 10_000


def around(tokenizer, text):
    """Let the tokenizer put special tokens where ``text`` says, such as ``"[CLS] $A [SEP]"``."""
    names = [name for name in text.split() if name != "$A"]
    specials = [(name, tokenizer.token_to_id(name)) for name in names]
    tokenizer.post_processor = processors.TemplateProcessing(single=text, special_tokens=specials)


def byte_level(specials=None):
    """As GPT-2's: spaces begin words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if specials:
        around(tokenizer, specials)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def llama_like():
    """As Llama's: a space is put in front of every text, and words are not split to merge."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="[UNK]", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    specials = ["[UNK]", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=specials, show_progress=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # no merge crosses words
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.pre_tokenizer = None
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    around(tokenizer, "<s> $A")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="[UNK]")


def bert_like():
    """As BERT's: lower case, words in pieces, [CLS] before and [SEP] after."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=120, special_tokens=["[UNK]", "[PAD]", "[CLS]", "[SEP]"], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    around(tokenizer, "[CLS] $A [SEP]")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]"
    )


def word_level():
    """One token a word: what is cut can be read off."""
    words = ["[UNK]", "</s>", "a", "A1", "A2", "Q", "OK", *(f"x{i}" for i in range(9)), *(f"y{i}" for i in range(9))]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="</s>")


TOKENIZERS = {
    "byte-level": byte_level(),
    "byte-level with BOS": byte_level("<s> $A"),
    "byte-level with EOS": byte_level("$A </s>"),
    "llama": llama_like(),
    "bert": bert_like(),
}
WORDS = word_level()
TWEET = Template("Tweet text : {Tweet text} Label : ")

every_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
tokenizers = st.sampled_from(list(TOKENIZERS.values()))
texts = st.text("abct .:'éß😀\n", max_size=25)


def answer_of(example):
    return [label for label in example.labels if label != -100]


def words_of(example):
    return WORDS.convert_ids_to_tokens(example.input_ids)


# Templates


def test_a_template_names_its_columns_and_counts_its_virtual_tokens():
    template = Template("{prompt:3} {Tweet text} {a:b} {Tweet text}{prompt:12} {prompt}")
    assert template.fields == ("Tweet text", "a:b", "prompt")
    assert template.num_virtual_tokens == 15
    assert Template("no places").num_virtual_tokens == 0


def test_doubled_braces_are_text():
    template = Template('{{"x": {{{x}}}}}')
    assert template.fields == ("x",)
    example = encode(template, {"x": "{x}"}, TOKENIZERS["byte-level"], max_length=LONG)
    assert TOKENIZERS["byte-level"].decode(example.input_ids) == '{"x": {{x}}}'


@pytest.mark.parametrize("text", ["{a", "a}", "{a}}", "{{a}", "{a{b}}", "{}", "}{"])
def test_a_stray_brace(text):
    with pytest.raises(DataError, match="has a stray"):
        Template(text)


@pytest.mark.parametrize("number", ["x", "0", "-1", "", "1.5", "00"])
def test_a_place_without_a_number(number):
    with pytest.raises(DataError, match="no number of virtual tokens; write one of 1 or more"):
        Template(f"{{prompt:{number}}}")


def test_check_names_what_is_missing_and_what_there_is():
    template = Template("{Tweet txt} {Label}")
    template.check(["Label", "Tweet txt", "ID"])
    with pytest.raises(DataError, match="no column 'Tweet txt' in the data, which has 'Tweet text', 'Label'; did you"):
        template.check(["Tweet text", "Label"])
    with pytest.raises(DataError, match="no column 'Tweet txt', 'Label' in the data, which has 'ID'; name one"):
        template.check(["ID"])


# Verbalizers


def test_verbalizer_gives_words_and_class_ids():
    verbalizer = Verbalizer({"1": "positive", "0": "negative"})
    assert verbalizer.labels == ("1", "0")
    assert (verbalizer.word("0"), verbalizer.index("0")) == ("negative", 1)
    assert (verbalizer.word(1), verbalizer.index(1)) == ("positive", 0)


def test_verbalizer_from_labels_is_the_identity():
    assert Verbalizer.from_labels(["b", "a", "b"]) == Verbalizer({"b": "b", "a": "a"})


@pytest.mark.parametrize("ask", [Verbalizer.word, Verbalizer.index])
def test_a_label_outside(ask):
    verbalizer = Verbalizer.from_labels(["complaint", "no complaint"])
    with pytest.raises(DataError, match=r"^label 'Unlabeled' is not one of 'complaint', 'no complaint'; add it"):
        ask(verbalizer, "Unlabeled")


@pytest.mark.parametrize("words", [{}, {"a": "yes", "b": ""}])
def test_a_verbalizer_without_words(words):
    with pytest.raises(DataError, match=r"has no words for (any label|\['b'\])"):
        Verbalizer(words)


# Whole texts


@every_tokenizer
def test_a_prompt_is_tokenized_as_its_whole_text(tokenizer):
    example = encode(TWEET, {"Tweet text": "It's hélp😀, ok"}, tokenizer, max_length=LONG)
    assert example.input_ids == tokenizer("Tweet text : It's hélp😀, ok Label :").input_ids
    assert example == Example(input_ids=example.input_ids, labels=[-100] * len(example.input_ids))


@pytest.mark.parametrize("name", ["byte-level", "byte-level with BOS", "llama"])
def test_prompt_and_answer_are_tokenized_as_their_whole_text(name):
    tokenizer = TOKENIZERS[name]
    example = encode(TWEET, {"Tweet text": "help"}, tokenizer, answer="complaint", max_length=LONG)
    assert example.input_ids == tokenizer("Tweet text : help Label : complaint").input_ids
    assert tokenizer.decode(answer_of(example)).strip() == "complaint"


@settings(deadline=None)
@given(tokenizers, texts, texts)
def test_any_prompt_is_tokenized_as_its_whole_text(tokenizer, premise, hypothesis):
    template = Template("premise :{premise} hypothesis : {hypothesis}?")
    record = {"premise": premise, "hypothesis": hypothesis}
    example = encode(template, record, tokenizer, max_length=LONG)
    assert example.input_ids == tokenizer(f"premise :{premise} hypothesis : {hypothesis}?").input_ids
    assert example.truncated == 0


@settings(deadline=None)
@given(tokenizers, texts, st.sampled_from(["Label : ", "Label :", "Label :\n", "co", ""]), texts)
def test_asking_without_the_answer_gives_the_tokens_that_training_saw(tokenizer, text, end, answer):
    template = Template("a {text} " + end)
    asked = encode(template, {"text": text}, tokenizer, answer="", max_length=LONG).input_ids
    trained = encode(template, {"text": text}, tokenizer, answer=answer, max_length=LONG)
    assert trained.input_ids == asked + answer_of(trained)
    assert trained.labels[: len(asked)] == [-100] * len(asked)


def test_the_space_at_the_end_is_the_answers():
    tokenizer = TOKENIZERS["byte-level"]
    spaced, own = (encode(Template(end), {}, tokenizer, answer="complaint", max_length=LONG) for end in ["a ", "a"])
    assert tokenizer.convert_ids_to_tokens(answer_of(spaced)) == ["Ġcomplaint"]
    assert tokenizer.decode(own.input_ids) == "acomplaint"


def test_an_answer_that_would_change_the_prompts_tokens_is_tokenized_apart():
    tokenizer = TOKENIZERS["byte-level"]
    whole = tokenizer("Tweet").input_ids
    example = encode(Template("Tw"), {}, tokenizer, answer="eet", max_length=LONG)
    assert example.input_ids != whole
    assert example.input_ids == tokenizer("Tw").input_ids + tokenizer("eet").input_ids
    assert answer_of(example) == tokenizer("eet").input_ids


@every_tokenizer
def test_no_special_token_comes_between_prompt_and_answer_or_after_it(tokenizer):
    example = encode(TWEET, {"Tweet text": "help"}, tokenizer, answer="complaint", max_length=LONG)
    specials = [token in tokenizer.all_special_ids for token in example.input_ids]
    assert not any(specials[1:])


def test_eos_is_the_last_label_if_asked_for():
    tokenizer = TOKENIZERS["byte-level"]
    without, with_eos = (
        encode(TWEET, {"Tweet text": "help"}, tokenizer, answer="yes", max_length=LONG, add_eos=add)
        for add in [False, True]
    )
    assert with_eos.input_ids == [*without.input_ids, tokenizer.eos_token_id]
    assert with_eos.labels == [*without.labels, tokenizer.eos_token_id]


# Places of virtual tokens


def test_places_split_the_text_and_take_a_space_on_either_side():
    tokenizer = TOKENIZERS["byte-level"]
    template = Template("{prompt:3} {text} {prompt:2}  answer:")
    example = encode(template, {"text": "the cat"}, tokenizer, answer=" yes", max_length=LONG)
    before, after = tokenizer("the cat").input_ids, tokenizer(" answer: yes").input_ids
    assert example.input_ids == before + after
    assert example.prompt_positions == [0] * 3 + [len(before)] * 2


@pytest.mark.parametrize(
    ("name", "first", "last"), [("bert", 1, 1), ("byte-level with BOS", 1, 0), ("byte-level", 0, 0)]
)
def test_places_at_the_ends_stand_within_the_special_tokens(name, first, last):
    template = Template("{prompt:2} {text} {prompt:1}")
    example = encode(template, {"text": "the cat"}, TOKENIZERS[name], max_length=LONG)
    assert example.prompt_positions == [first, first, len(example.input_ids) - last]
    assert example.input_ids == TOKENIZERS[name]("the cat").input_ids


def test_an_answer_right_after_a_place_is_a_text_of_its_own():
    tokenizer = TOKENIZERS["byte-level"]
    for text in ["a{prompt:1}", "a {prompt:1} "]:
        example = encode(Template(text), {}, tokenizer, answer="yes", max_length=LONG)
        assert answer_of(example) == tokenizer("yes").input_ids
        assert example.prompt_positions == [len(example.input_ids) - len(answer_of(example))]


# Cutting


@pytest.mark.parametrize(
    ("max_length", "xs", "ys"),
    [(14, 7, 3), (13, 7, 3), (12, 6, 3), (9, 3, 3), (8, 3, 2), (7, 2, 2), (4, 1, 0), (3, 0, 0)],
)
def test_the_longest_field_is_cut_first(max_length, xs, ys):
    record = {"x": " ".join(f"x{i}" for i in range(7)), "y": "y0 y1 y2"}
    example = encode(Template("A1 {x} A2 {y} Q "), record, WORDS, max_length=max_length)
    fields = [f"x{i}" for i in range(7)], [f"y{i}" for i in range(3)]
    kept = Counter(word[0] for word in words_of(example))
    assert kept["x"] + kept["y"] == min(10, max_length - 3)
    assert sorted([kept["x"], kept["y"]]) == sorted([xs, ys])
    assert words_of(example) == ["A1", *fields[0][: kept["x"]], "A2", *fields[1][: kept["y"]], "Q"]
    assert example.truncated == 10 - kept["x"] - kept["y"]


def evened(lengths, budget):
    """The slow way to share: take one from the longest until all fit."""
    lengths = list(lengths)
    while sum(lengths) > budget:
        lengths[lengths.index(max(lengths))] -= 1
    return sorted(lengths)


@settings(deadline=None)
@given(st.lists(st.integers(0, 9), min_size=2, max_size=2), st.integers(5, 25), st.booleans())
def test_words_and_answer_are_never_cut_and_fields_share_evenly(lengths, max_length, add_eos):
    record = {name: " ".join(f"{name}{i}" for i in range(length)) for name, length in zip("xy", lengths, strict=True)}
    template = Template("{prompt:2} A1 {x} A2 {y} {prompt:1} Q ")
    example = encode(template, record, WORDS, answer="OK", max_length=max_length, add_eos=add_eos)
    words = words_of(example)
    kept = Counter(word[0] for word in words)
    ending = ["OK", "</s>"][: 1 + add_eos]
    expected = ["A1", *record["x"].split()[: kept["x"]], "A2", *record["y"].split()[: kept["y"]], "Q", *ending]
    assert words == expected
    assert sorted([kept["x"], kept["y"]]) == evened(lengths, max_length - 3 - len(ending))
    assert example.truncated == sum(lengths) - kept["x"] - kept["y"]
    assert example.prompt_positions == [0, 0, len(words) - 1 - len(ending)]


@settings(deadline=None)
@given(
    tokenizers,
    st.fixed_dictionaries({"premise": texts, "hypothesis": texts}),
    st.sampled_from(["yes", "no, maybe", None]),
    st.integers(0, 40),
)
def test_what_is_cut_is_a_part_of_what_is_whole(tokenizer, record, answer, room):
    template = Template(
        "{prompt:2} premise:{premise} {prompt:1} {premise}hypothesis : {hypothesis}! {prompt:4}  entails : "
    )
    empty = encode(template, {"premise": "", "hypothesis": ""}, tokenizer, answer=answer, max_length=LONG)
    whole = encode(template, record, tokenizer, answer=answer, max_length=LONG)
    # Tokens that join a word with a field's text are the template's: the least that is needed may exceed `empty`.
    max_length = len(empty.input_ids) + 8 + room
    example = encode(template, record, tokenizer, answer=answer, max_length=max_length)
    assert len(example.input_ids) == len(example.labels) == min(len(whole.input_ids), max_length)
    assert example.truncated == len(whole.input_ids) - len(example.input_ids)
    assert answer_of(example) == answer_of(whole) == answer_of(empty)
    rest = iter(whole.input_ids)
    assert all(token in rest for token in example.input_ids)
    positions = example.prompt_positions
    assert len(positions) == template.num_virtual_tokens == 7
    assert positions == sorted(positions)
    assert 0 <= positions[0] <= positions[-1] <= len(example.input_ids)
    last = len(example.input_ids) - positions[-1]
    assert example.input_ids[-last:] == whole.input_ids[-last:] == empty.input_ids[-last:]


def test_a_token_that_joins_a_field_with_a_word_is_never_cut():
    tokenizer = TOKENIZERS["byte-level"]
    template, record = Template("cat {x}mplaint"), {"x": "my co"}
    example = encode(template, record, tokenizer, max_length=3)
    assert tokenizer.decode(example.input_ids) == "cat complaint"
    with pytest.raises(DataError, match="take 3 tokens, max_length is 2"):
        encode(template, record, tokenizer, max_length=2)


@every_tokenizer
def test_the_template_and_answer_just_fit_or_do_not(tokenizer):
    record = {"Tweet text": "the cat sat on the mat"}
    least = len(encode(TWEET, {"Tweet text": ""}, tokenizer, answer="complaint", max_length=LONG).input_ids)
    # An empty text leaves two spaces side by side, which some tokenizers write as a token more.
    example = encode(TWEET, record, tokenizer, answer="complaint", max_length=least)
    assert len(example.input_ids) == least
    with pytest.raises(DataError, match=r"template and answer alone take \d+ tokens, max_length is 3; raise it"):
        encode(TWEET, record, tokenizer, answer="complaint", max_length=3)


# Refusing


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "a"}, "no column 'Tweet text'"),
        ({"Tweet text": None}, "column 'Tweet text' holds null; make it text"),
        ({"Tweet text": {"a": 1}}, "column 'Tweet text' holds a dict; make it text"),
        ({"Tweet text": ["a", None]}, "column 'Tweet text' holds null; make it text"),
    ],
)
def test_a_record_that_does_not_fit(record, message):
    with pytest.raises(DataError, match=message):
        encode(TWEET, record, WORDS, max_length=LONG)


def test_a_text_without_tokens():
    with pytest.raises(DataError, match="the text has no tokens"):
        encode(Template("{x}"), {"x": " "}, WORDS, max_length=LONG)


def test_eos_of_a_tokenizer_without_one():
    with pytest.raises(DataError, match="no end-of-sequence token"):
        encode(TWEET, {"Tweet text": "a"}, TOKENIZERS["bert"], answer="a", max_length=LONG, add_eos=True)


def test_a_slow_tokenizer():
    class Slow:
        is_fast = False

    with pytest.raises(DataError, match="load a fast one"):
        encode(TWEET, {"Tweet text": "a"}, Slow(), max_length=LONG)
