"""Words and tokens: the official code's numbers, and what must hold for any prompt and tokenizer."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import ByT5Tokenizer

from diffusion_attn.editing.prompts import refinement_map, replacement_matrix, word_schedule, word_tokens
from tests.editing import tokenizers
from tests.editing.golden import DPL, VIMAEDIT

TOKENIZERS = {name: build() for name, build in tokenizers.ALL.items()}
any_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
WORDS = ["a", "cat", "dog", "squirrel", "watermelon", "tomato", "leopard,", "the", "snow", ""]


def prompts(size):
    return st.lists(st.sampled_from(WORDS), min_size=size, max_size=size).map(" ".join)


# ---- the official code's numbers


@DPL.named("word_indices")
def test_word_tokens_of_the_dpl_cases(name):
    DPL.close(word_tokens(**DPL.cases[name]["inputs"], tokenizer=tokenizers.clip()), name, "indices")


@VIMAEDIT.named("word_tokens")
def test_word_tokens_of_the_vimaedit_cases(name):
    prompt, word = (VIMAEDIT.cases[name]["parameters"][key] for key in ("text", "word"))
    VIMAEDIT.close(word_tokens(prompt, word, tokenizers.pieces(prompt)), name, "indices")


@DPL.named("replace_mapper")
def test_replacement_of_the_dpl_cases(name):
    prompts = DPL.cases[name]["inputs"]
    DPL.close(replacement_matrix(**prompts, tokenizer=tokenizers.clip(), alignment="reference"), name, "mapper")


@VIMAEDIT.named("replace_mapper")
def test_replacement_of_the_vimaedit_cases(name):
    pair = [VIMAEDIT.cases[name]["parameters"][key] for key in ("source", "target")]
    matrix = replacement_matrix(*pair, tokenizers.pieces(*pair), "reference")
    rows, columns = matrix.nonzero().T
    VIMAEDIT.close(torch.stack([rows, columns, matrix[rows, columns]], 1), name, "triples")


@DPL.named("refine_mapper")
def test_refinement_of_the_dpl_cases(name):
    mapper, alphas = refinement_map(**DPL.cases[name]["inputs"], tokenizer=tokenizers.clip())
    DPL.close(mapper, name, "mapper")
    DPL.close(alphas, name, "alphas")


@VIMAEDIT.named("refine_mapper")
def test_refinement_of_the_vimaedit_cases(name):
    pair = [VIMAEDIT.cases[name]["parameters"][key] for key in ("source", "target")]
    mapper, alphas = refinement_map(*pair, tokenizers.pieces(*pair))
    VIMAEDIT.close(mapper[None], name, "mapper")
    VIMAEDIT.close(alphas[None], name, "alphas")


@DPL.named("time_alpha")
def test_schedule_of_the_dpl_cases(name):
    case = DPL.cases[name]
    steps, target = case["params"]["num_steps"], case["inputs"]["prompts"][1]
    schedule = word_schedule(target, case["inputs"]["cross_replace_steps"], steps, tokenizers.clip())
    # The official table has a row that no step reads.
    torch.testing.assert_close(schedule, DPL.expected(name, "alpha")[:steps])


@VIMAEDIT.named("word_schedule")
def test_schedule_of_the_vimaedit_cases(name):
    params = VIMAEDIT.cases[name]["parameters"]
    steps, target = params["num_inference_steps"], params["prompts"][1]
    schedule = word_schedule(target, params["cross_text_replace_steps"], steps, tokenizers.pieces(target))
    torch.testing.assert_close(schedule, VIMAEDIT.expected(name, "alpha")[:steps, 0])


# ---- words


@any_tokenizer
@pytest.mark.parametrize("prompt", ["a  cat, and a Squirrel", " squirrel's  nut ", "the dog"])
def test_the_tokens_of_a_word_spell_it(tokenizer, prompt):
    spans = tokenizer(prompt, return_offsets_mapping=True)["offset_mapping"]
    for index, word in enumerate(prompt.split(" ")):
        tokens = word_tokens(prompt, index, tokenizer)
        assert "".join(prompt[slice(*spans[token])] for token in tokens).strip() == word
        assert set(tokens) <= set(word_tokens(prompt, word, tokenizer))


@any_tokenizer
def test_a_word_owns_every_occurrence_and_nothing_else(tokenizer):
    prompt = "a cat and a cat, catcat"
    first, second = (word_tokens(prompt, index, tokenizer) for index in (1, 4))
    assert word_tokens(prompt, "cat", tokenizer) == first
    assert word_tokens(prompt, "a", tokenizer) == sorted(
        word_tokens(prompt, 0, tokenizer) + word_tokens(prompt, 3, tokenizer)
    )
    assert second and not set(first) & set(second)
    for absent in ("dog", "cat and", "", 6, -1):
        assert word_tokens(prompt, absent, tokenizer) == []


def test_unknown_characters_and_characters_of_several_tokens_shift_nothing():
    tokenizer = tokenizers.clip()
    ids = tokenizer("naïve 🐱 cat").input_ids
    assert word_tokens("naïve 🐱 cat", "cat", tokenizer) == [len(ids) - 2]
    assert len(word_tokens("naïve 🐱 cat", "🐱", tokenizer)) == 4


def test_special_tokens_belong_to_no_word_whatever_their_offsets():
    class Spanning:
        """Start and end stand for the whole prompt."""

        model_max_length = 77

        def __call__(self, prompt, **options):
            encoded = tokenizers.clip()(prompt, **options)
            encoded["offset_mapping"] = [span if span[1] else (0, len(prompt)) for span in encoded["offset_mapping"]]
            return encoded

    assert word_tokens("a squirrel", "squirrel", Spanning()) == [2, 3]
    pair = "a squirrel sat", "a cat sat"
    assert torch.equal(replacement_matrix(*pair, Spanning()), replacement_matrix(*pair, tokenizers.clip()))


def test_truncated_words_have_no_tokens():
    tokenizer = tokenizers.clip(length=6)
    prompt = "a squirrel and watermelon"
    assert word_tokens(prompt, "squirrel", tokenizer) == [2, 3]
    assert word_tokens(prompt, "watermelon", tokenizer) == []
    with pytest.raises(ValueError, match=r"'watermelon'.*'a squirrel and watermelon'.*first 6 tokens"):
        word_schedule(prompt, {"watermelon": 0.5}, 10, tokenizer)


# ---- replacement


def test_several_words_of_different_lengths():
    """Against blocks written out by hand: [start] a squir|rel and a dog [end] and so on."""
    tokenizer = tokenizers.clip(length=10)
    source, target = "a squirrel and a cat", "a cat and a squirrel"
    assert word_tokens(source, 1, tokenizer) == [2, 3] and word_tokens(target, 4, tokenizer) == [5, 6]
    aligned = torch.zeros(10, 10)
    for row, columns in enumerate([[0], [1], [2], [2], [3], [4], [5, 6], [7], [8], [9]]):
        aligned[row, columns] = 1 / len(columns)
    torch.testing.assert_close(replacement_matrix(source, target, tokenizer), aligned)
    # Both lengths agree behind the last changed word: there is nothing for the published code to get wrong.
    torch.testing.assert_close(replacement_matrix(source, target, tokenizer, "reference"), aligned)


def test_words_behind_the_last_change_keep_their_own_maps_when_aligned():
    tokenizer = tokenizers.clip()
    source, target = "a cat in the snow", "a squirrel in the snow"
    aligned, reference = (replacement_matrix(source, target, tokenizer, how) for how in ("aligned", "reference"))
    (of_source,), (of_target,) = word_tokens(source, "the", tokenizer), word_tokens(target, "the", tokenizer)
    assert aligned[:, of_target].nonzero().tolist() == [[of_source]]
    assert reference[:, of_target].nonzero().tolist() == [[of_target]]


@any_tokenizer
@settings(max_examples=40, deadline=None)
@given(pair=st.integers(1, 6).flatmap(lambda n: st.tuples(prompts(n), prompts(n))))
def test_aligned_rows_sum_to_one_but_for_padding_pushed_out(tokenizer, pair):
    lengths = [len(tokenizer(prompt).input_ids) for prompt in pair]
    sums = replacement_matrix(*pair, tokenizer).sum(1)
    pushed_out = max(0, lengths[1] - lengths[0])
    torch.testing.assert_close(sums[: 77 - pushed_out], torch.ones(77 - pushed_out))
    assert not sums[77 - pushed_out :].any()


@settings(max_examples=40, deadline=None)
@given(
    pair=st.integers(1, 8).flatmap(lambda n: st.tuples(prompts(n), prompts(n))),
    length=st.integers(3, 12),
    alignment=st.sampled_from(["aligned", "reference"]),
)
def test_truncated_prompts_lose_no_attention(pair, length, alignment):
    tokenizer = tokenizers.clip(length)
    matrix = replacement_matrix(*pair, tokenizer, alignment)
    ends = [len(tokenizer(prompt, truncation=True, max_length=length).input_ids) for prompt in pair]
    assert matrix[0, 0] == 1
    if alignment == "aligned":
        torch.testing.assert_close(matrix.sum(1)[: ends[0]], torch.ones(ends[0]))
        assert matrix[ends[0] - 1, ends[1] - 1] == 1  # end goes to end


@any_tokenizer
@pytest.mark.parametrize("alignment", ["aligned", "reference"])
def test_equal_prompts_give_the_identity(tokenizer, alignment):
    for prompt in ("a squirrel and  a cat,", "", "watermelon " * 30):
        torch.testing.assert_close(replacement_matrix(prompt, prompt, tokenizer, alignment), torch.eye(77))


def test_a_word_that_is_deleted_leaves_its_attention_to_the_start_token():
    matrix = replacement_matrix("a squirrel sat", "a  sat", tokenizers.characters())
    tokens = word_tokens("a squirrel sat", "squirrel", tokenizers.characters())
    assert matrix[tokens].sum(0).nonzero().tolist() == [[0]]


def test_replacement_takes_as_many_words():
    with pytest.raises(ValueError, match=r"'a cat' has 2 words.*'a red cat' has 3.*refinement_map"):
        replacement_matrix("a cat", "a red cat", tokenizers.clip())
    with pytest.raises(ValueError, match="alignment='exact'"):
        replacement_matrix("a cat", "a dog", tokenizers.clip(), "exact")


# ---- refinement


@any_tokenizer
@settings(max_examples=20, deadline=None)
@given(prompt=st.integers(0, 12).flatmap(prompts))
def test_refinement_of_equal_prompts_is_the_identity(tokenizer, prompt):
    mapper, alphas = refinement_map(prompt, prompt, tokenizer)
    assert torch.equal(mapper, torch.arange(77)) and alphas.eq(1).all()


@any_tokenizer
@settings(max_examples=40, deadline=None)
@given(source=st.integers(1, 9).flatmap(prompts), target=st.integers(1, 9).flatmap(prompts))
def test_refinement_copies_equal_tokens_in_order(tokenizer, source, target):
    ids = [tokenizer(prompt).input_ids for prompt in (source, target)]
    mapper, alphas = refinement_map(source, target, tokenizer)
    assert mapper.dtype == torch.long and torch.equal(alphas, (mapper >= 0).float())
    copied = [(place, mapper[place].item()) for place in range(len(ids[1])) if alphas[place]]
    assert all(ids[1][place] == ids[0][origin] for place, origin in copied)
    origins = [origin for _, origin in copied]
    assert origins == sorted(set(origins))
    assert (0, 0) in copied and (len(ids[1]) - 1, len(ids[0]) - 1) in copied
    assert torch.equal(mapper[len(ids[1]) :], torch.arange(len(ids[1]), 77))


def test_refinement_finds_words_that_are_added_and_removed():
    mapper, alphas = refinement_map("a cat", "a squirrel cat", tokenizers.clip())
    assert mapper[:7].tolist() == [0, 1, -1, -1, 2, 3, 6] and alphas[:7].tolist() == [1, 1, 0, 0, 1, 1, 1]
    mapper, alphas = refinement_map("a dog the cat", "a cat", tokenizers.clip())
    assert mapper[:5].tolist() == [0, 1, 4, 5, 4] and alphas.all()


def test_of_two_words_that_change_places_the_one_that_stood_last_is_copied():
    """Both alignments are as long; this is the published one."""
    mapper, alphas = refinement_map("cat dog", "dog cat", tokenizers.clip())
    assert mapper[:4].tolist() == [0, 2, -1, 3] and alphas[:4].tolist() == [1, 1, 0, 1]


def test_refinement_of_prompts_longer_than_the_model_takes():
    tokenizer = tokenizers.clip(length=5)
    mapper, alphas = refinement_map("a cat and a dog", "the cat and a dog", tokenizer)
    assert mapper.tolist() == [0, -1, 2, 3, 4] and alphas.tolist() == [1, 0, 1, 1, 1]


# ---- schedules


@pytest.mark.parametrize(
    "window, steps",
    [(0, []), (1, range(10)), (0.5, range(5)), (0.92, range(10)), ((0.2, 0.5), range(2, 5)), ([0.9, 1], [9])],
)
def test_windows(window, steps):
    schedule = word_schedule("a cat", window, 10, tokenizers.clip())
    assert schedule.shape == (10, 77) and schedule.dtype == torch.float32
    assert all(schedule[step].eq(float(step in steps)).all() for step in range(10))


def test_words_have_windows_of_their_own():
    tokenizer = tokenizers.clip()
    windows = {2: 0.0, "default_": 0.5, "squirrel": (0.6, 1.0)}
    schedule = word_schedule("a squirrel and  a cat", windows, 10, tokenizer)
    starts = schedule.argmax(0)
    assert starts[[2, 3]].tolist() == [6, 6]
    assert not schedule[:, 4].any()
    others = [n for n in range(77) if n not in (2, 3, 4)]
    assert schedule[:5, others].all() and not schedule[5:, others].any()
    assert list(windows) == [2, "default_", "squirrel"]


def test_without_a_default_all_other_words_are_always_injected():
    schedule = word_schedule("a cat", {"cat": 0}, 4, tokenizers.clip())
    assert schedule.sum(0).tolist() == [4, 4, 0, *[4] * 74]


@pytest.mark.parametrize("word", ["dog", "", 3, "a cat"])
def test_a_schedule_names_only_words_of_its_prompt(word):
    with pytest.raises(ValueError, match=f"{word!r}.*'a  cat'"):
        word_schedule("a  cat", {word: 0.5}, 10, tokenizers.clip())


@pytest.mark.parametrize("window", [-0.1, (0.5, 0.2), (0.1, 0.2, 0.3), (0.4,), (-1, 0.5)])
def test_what_is_no_window(window):
    with pytest.raises(ValueError, match=r"replace_steps has the window.*fractions"):
        word_schedule("a cat", window, 10, tokenizers.clip())
    with pytest.raises(ValueError, match=r"replace_steps has the window.*fractions"):
        word_schedule("a cat", {"cat": window}, 10, tokenizers.clip())


def test_a_schedule_has_steps():
    with pytest.raises(ValueError, match="num_inference_steps=0"):
        word_schedule("a cat", 0.5, 0, tokenizers.clip())


# ---- tokenizers


@pytest.mark.parametrize(
    "call",
    [
        lambda tokenizer: word_tokens("a cat", "cat", tokenizer),
        lambda tokenizer: replacement_matrix("a cat", "a dog", tokenizer),
        lambda tokenizer: refinement_map("a cat", "a dog", tokenizer),
        lambda tokenizer: word_schedule("a cat", {"cat": 0.4}, 10, tokenizer),
    ],
)
def test_tokenizers_that_do_not_serve(call):
    with pytest.raises(ValueError, match=r"ByT5Tokenizer.*load the fast one"):
        call(ByT5Tokenizer(model_max_length=40))


def test_tables_take_a_length():
    tokenizer = tokenizers.clip(length=10**30)
    assert word_tokens("a cat", "cat", tokenizer) == [2]
    for call in (refinement_map, replacement_matrix):
        with pytest.raises(ValueError, match=r"model_max_length is 10{30}.*set it"):
            call("a cat", "a dog", tokenizer)
