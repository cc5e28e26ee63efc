"""Answers made of words: hand-worked cases, and the values of anls 0.0.2 and of lmms-eval's copy of VQA's rules."""

import pytest

from megatron_vlm.evaluate import words
from tests.evaluate.reference import cases


@pytest.mark.parametrize(("text", "normal"), cases("vqa"))
def test_vqa_normal_form_is_the_published_one(text, normal):
    assert words.vqa_normalized(text) == normal


@pytest.mark.parametrize(("said", "accepted", "score"), cases("anls"))
def test_anls_is_that_of_the_package(said, accepted, score):
    assert words.anls(said, accepted) == pytest.approx(score, abs=1e-12)


def test_vqa_asks_for_three_others():
    answers = ["2"] * 3 + ["two dogs"] * 2 + ["many"] * 5
    # "two" becomes 2. For each of the three who said it 2 others did, for the other seven 3: (3 x 2/3 + 7 x 1) / 10.
    assert words.vqa("Two.", answers) == pytest.approx(0.9)
    assert words.vqa("two dogs", answers) == pytest.approx((2 * 1 / 3 + 8 * 2 / 3) / 10)
    assert words.vqa("MANY", answers) == 1.0 and words.vqa("none", answers) == 0.0
    assert words.vqa("The cat.", ["cat"]) == 1.0 and words.vqa("dog", ["cat"]) == 0.0


@pytest.mark.parametrize(
    ("said", "wanted", "score"),
    [("105", "100", 1), ("105.1", "100", 0), ("95", "100", 1), ("1,050", "1000", 1), ("5%", "0.05", 1),
     ("Yes", "yes", 1), ("0", "0", 1), ("0.01", "0", 0), ("-5.2", "-5", 1), ("5", "-5", 0), ("nan", "1", 0),
     ("inf", "1", 0), ("blue", "red", 0)],
)  # fmt: skip
def test_relaxed_accuracy(said, wanted, score):
    assert words.relaxed(said, [wanted]) == score


OPTIONS = [("A", "the left hand"), ("B", "left"), ("C", "Paris, France")]


@pytest.mark.parametrize(
    ("said", "option"),
    [("B", 1), ("b)", 1), ("(C)", 2), ("B. left", 1), ("The answer is B.", 1), ("Answer: (a)", 0), ("left.", 1),
     ("paris france", 2), ("It shows the left hand, I think", 0), ("Z", None), ("", None), ("A or B", None),
     ("right", None), ("A left hand or Paris, France", None)],
)  # fmt: skip
def test_which_option_is_named(said, option):
    assert words.choice(said, OPTIONS) == option


def test_options_are_read_from_a_question():
    question = "Which one?\nA. a cat\n(2) a dog\nc) 3.5 metres\nChoose one of the options."
    assert words.options(question) == [("A", "a cat"), ("2", "a dog"), ("c", "3.5 metres")]


@pytest.mark.parametrize(
    ("said", "form", "decimals", "found"),
    [("The number missing is 14.", "integer", 0, 14.0), ("14.7", "integer", 0, 14.0),
     ("1,200 of 3,400", "integer", 0, 3400.0),
     ("It costs $1.48", "float", 1, 1.5), ("-.5", "float", 2, -0.5), ("0.6, I think", "float", 1, 0.6),
     ("between [2007, 2008]", "list", 0, [2007, 2008]), ("[1], then [1.5, 2]", "list", 0, [1.5, 2]),
     ("A cat.", "text", 0, "a cat"), ("none", "integer", 0, None), ("[]", "list", 0, None), (" ", "text", 0, None),
     ("9" * 40, "integer", 0, None), ("2-3", "integer", 0, 3.0)],
)  # fmt: skip
def test_the_answer_that_is_stated(said, form, decimals, found):
    assert words.stated(said, form, decimals) == found


def test_exact_answers_are_compared_without_case_and_full_stop():
    assert words.exact(" Yes.\n", ["no", "yes"]) == 1 and words.exact("yes no", ["yes"]) == 0
