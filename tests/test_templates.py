"""Prompts, answers and dialogues as token ids: exact text, exact masks, and the prefix rule."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fastalign.config import ConfigError
from fastalign.data import RowError, Stream
from fastalign.templates import (
    CUT_OFF,
    NO_ANSWER,
    NO_ROOM,
    PRINCIPLES,
    TEMPLATES,
    JudgeTemplate,
    Renderer,
    WrittenTemplate,
    fit,
    fit_stream,
    load_judge_template,
    load_template,
    load_written_template,
)

# Contents go into the prompt as they are, answers are followed by the end token and a line feed.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STRIPPING = CHATML.replace("m['content']", "m['content'] | trim")
# Llama 2: BOS in the template, no generation prompt, a space before the end token.
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<s>[INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] }} </s>"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
# Qwen 3: the last answer shows an empty thought, which disappears when the dialogue goes on.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)
# GLM 4: nothing ends an answer but the next turn.
ENDLESS = (
    "{% for m in messages %}[{{ m['role'] }}]\n{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)
# The turn before the answer changes once it is answered.
REWRITING = (
    "{% for m in messages %}[{{ m['role'] }}{{ '!' if loop.last else '' }}]{{ m['content'] }}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}[assistant!]{% endif %}"
)


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str, **more) -> dict:
    return {"role": "assistant", "content": text, **more}


@pytest.fixture(scope="module")
def tiny(tiny_llama: Path) -> PreTrainedTokenizerFast:
    """The shared ChatML tokenizer."""
    return AutoTokenizer.from_pretrained(tiny_llama)


def make_tokenizer(template: str | None, *, frame: str = "$A") -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that joins line feeds and adds special tokens as ``frame`` says."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    specials = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(["\n\n\n\n", "is A or B\n\n", "The better is A\n\n"] * 9, trainer)
    core.post_processor = processors.TemplateProcessing(
        single=frame, special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def framing() -> PreTrainedTokenizerFast:
    """Adds BOS and EOS to every text, as Llama's and T5's tokenizers would."""
    return make_tokenizer(LLAMA2, frame="<s> $A </s>")


@pytest.fixture(scope="module")
def pieces() -> PreTrainedTokenizerFast:
    """SentencePiece's habit: every text begins with a space of its own."""
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    core.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(
        vocab_size=120, special_tokens=["<unk>", "</s>"], show_progress=False
    )
    core.train_from_iterator(["Q: why? A: so. " * 4, "so what? so."] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'A: s' if m['role'] == 'assistant' else 'Q: ' }}"
        "{{ m['content'] }}{{ '</s>' if m['role'] == 'assistant' else ' ' }}{% endfor %}"
        "{% if add_generation_prompt %}A: s{% endif %}"
    )
    return tokenizer


def text_of(renderer: Renderer, ids: np.ndarray) -> str:
    return renderer.tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def assert_prefix(renderer: Renderer, prompt_ids: np.ndarray, completion_ids: np.ndarray) -> None:
    assert prompt_ids.dtype == completion_ids.dtype == np.int32
    assert prompt_ids.ndim == completion_ids.ndim == 1
    assert completion_ids[-1] in renderer.eos_ids
    assert not set(completion_ids[:-1].tolist()) & renderer.eos_ids


# --- prompts and answers ---


def test_prompt_is_what_the_tokenizer_itself_gives(tiny):
    messages = [{"role": "system", "content": "S"}, user("a\n"), assistant(" b"), user("c")]
    expected = tiny.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    ids = Renderer(tiny).prompt_ids(messages)
    assert ids.tolist() == expected and ids.dtype == np.int32


def test_completion_ends_with_the_end_of_turn_token(tiny):
    renderer = Renderer(tiny)
    prompt_ids, completion_ids = renderer.completion([user("Hi")], "Yes.")
    assert text_of(renderer, prompt_ids) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    # The template's line feed after the end token is not part of the answer.
    assert text_of(renderer, completion_ids) == "Yes.<|im_end|>"
    assert prompt_ids.tolist() == renderer.prompt_ids([user("Hi")]).tolist()
    assert renderer.decode(completion_ids) == "Yes."
    assert renderer.eos_ids == {tiny.convert_tokens_to_ids("<|im_end|>")}


ANSWERS = [
    "A",
    " A",
    "\nA",
    "\n\n\nA\n\n",
    "  spaced  ",
    "é 漢字 🙂\u200b",
    "A" * 300,
    "### Response:\nA",
    "{instruction} {{x}} %s",
]


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("template", [CHATML, ENDLESS, "alpaca"])
def test_prompt_is_a_prefix_and_the_answer_is_kept(template, answer):
    chat = None if template == "alpaca" else template
    renderer = Renderer(make_tokenizer(chat), "alpaca" if chat is None else "chat")
    messages = [user("\nWhat?\n"), assistant("No."), user("Why?")]
    prompt_ids, completion_ids = renderer.completion(messages, answer)
    assert_prefix(renderer, prompt_ids, completion_ids)
    assert prompt_ids.tolist() == renderer.prompt_ids(messages).tolist()
    assert renderer.decode(completion_ids) == answer


def test_a_token_across_the_boundary_is_split():
    """The prompt ends with a line feed and the answer begins with two: two of three are a token."""
    tokenizer = make_tokenizer(CHATML)
    renderer = Renderer(tokenizer)
    prompt_ids, completion_ids = renderer.completion([user("x")], "\n\nA")
    rendered = tokenizer.apply_chat_template([user("x"), assistant("\n\nA")], tokenize=False)
    whole = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert whole[: len(prompt_ids)] != prompt_ids.tolist()
    joined = np.concatenate([prompt_ids, completion_ids])
    assert text_of(renderer, joined) + "\n" == rendered


def test_a_token_across_the_boundary_that_cannot_be_split_is_named(pieces):
    renderer = Renderer(pieces)
    prompt_ids, completion_ids = renderer.completion([user("why?")], ". so.")
    assert_prefix(renderer, prompt_ids, completion_ids)
    with pytest.raises(RowError) as caught:
        renderer.completion([user("why?")], "o.", source="f.jsonl:3")
    # The prompt ends with "s", prompt and answer with "so": on its own "o." would gain a space.
    assert str(caught.value) == (
        "f.jsonl:3: the tokens of the prompt are no prefix of those of the prompt and its answer: "
        "from token 3 on they read 's' and 'so.</s>'"
    )
    assert caught.value.reason == "tokenizer: the prompt is no prefix"


@settings(max_examples=150, deadline=None)
@given(
    contents=st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=3),
    answer=st.text(min_size=1, max_size=30),
    name=st.sampled_from(["chat", "alpaca"]),
)
def test_prefix_rule_on_any_text(contents, answer, name):
    renderer = ANY[name]
    messages = [user(text) for text in contents]
    prompt_ids, completion_ids = renderer.completion(messages, answer)
    assert_prefix(renderer, prompt_ids, completion_ids)
    assert prompt_ids.tolist() == renderer.prompt_ids(messages).tolist()
    assert renderer.decode(completion_ids) == answer
    stream = renderer.conversation([*messages, assistant(answer)])
    assert stream.input_ids.tolist() == [*prompt_ids, *completion_ids]
    assert stream.loss_mask.tolist() == [False] * len(prompt_ids) + [True] * len(completion_ids)


ANY = {name: Renderer(make_tokenizer(CHATML), name) for name in ("chat", "alpaca")}


def test_template_that_strips_content():
    renderer = Renderer(make_tokenizer(STRIPPING))
    prompt_ids, completion_ids = renderer.completion([user(" x ")], "\n so \n")
    assert text_of(renderer, prompt_ids).endswith("user\nx<|im_end|>\n<|im_start|>assistant\n")
    assert text_of(renderer, completion_ids) == "so<|im_end|>"


def test_template_without_an_end_token_gets_the_tokenizers():
    renderer = Renderer(make_tokenizer(ENDLESS))
    prompt_ids, completion_ids = renderer.completion([user("x")], "so")
    assert text_of(renderer, prompt_ids) == "[user]\nx[assistant]\n"
    assert text_of(renderer, completion_ids) == "so</s>"
    stream = renderer.conversation([user("x"), assistant("a"), user("y"), assistant("b")])
    assert (
        text_of(renderer, stream.input_ids) == "[user]\nx[assistant]\na[user]\ny[assistant]\nb</s>"
    )
    assert text_of(renderer, stream.input_ids[stream.loss_mask]) == "ab</s>"


def test_template_with_text_before_the_end_token(framing):
    renderer = Renderer(framing)
    prompt_ids, completion_ids = renderer.completion([user("x")], "so")
    assert text_of(renderer, prompt_ids) == "<s>[INST] x [/INST]"
    assert text_of(renderer, completion_ids) == " so </s>"


def test_bos_is_never_doubled(framing):
    """Chat templates write it themselves, text templates leave it to the tokenizer."""
    for name in ("chat", "alpaca"):
        renderer = Renderer(framing, name)
        prompt_ids, completion_ids = renderer.completion([user("x")], "so")
        ids = [*prompt_ids, *completion_ids]
        assert ids[0] == 0 and ids.count(0) == 1, name
        assert ids[-1] == 1 and ids.count(1) == 1, name
        assert renderer.judged_prompt_ids([user("x")], "Bad.").tolist().count(0) == 1
        assert renderer.judge_prompt_ids([user("x")], "a", "b").tolist().count(0) == 1
    plain = Renderer(make_tokenizer(None), "alpaca")  # this one adds nothing
    assert 0 not in plain.prompt_ids([user("x")])


def test_further_end_tokens_of_the_model(tiny):
    end = tiny.convert_tokens_to_ids("<|im_end|>")
    assert Renderer(tiny, eos_ids=[7, end]).eos_ids == {7, end}
    assert Renderer(make_tokenizer(CHATML)).eos_ids == {1, 3}  # </s> and <|im_end|>


def test_end_token_inside_an_answer_is_named(tiny):
    renderer = Renderer(tiny)
    message = (
        "f:1: field completion: value 'a<|im_end|>b': must not hold the end-of-turn token "
        "'<|im_end|>'"
    )
    with pytest.raises(RowError) as caught:
        renderer.completion([user("x")], "a<|im_end|>b", source="f:1")
    assert str(caught.value) == message
    with pytest.raises(RowError) as caught:
        renderer.conversation([user("x"), assistant("a<|im_end|>b")], source="f:1")
    assert str(caught.value) == message


def test_template_that_rewrites_its_prompt_is_named():
    renderer = Renderer(make_tokenizer(REWRITING))
    with pytest.raises(RowError) as caught:
        renderer.completion([user("What is it?")], "so", source="rows.jsonl:17")
    assert str(caught.value) == (
        "rows.jsonl:17: the chat template does not continue its own prompt: from character 5 the "
        "prompt has '!]What is it?<|im_end|>[' and the dialogue ']What is it?<|im_end|>[a': a "
        "template that rewrites earlier turns cannot be trained on as one dialogue (give each "
        "answer as a row of its own)"
    )
    assert caught.value.reason == "chat template: the prompt is no prefix"


def test_template_that_refuses_a_role(framing):
    messages = [{"role": "system", "content": "S"}, user("x")]
    with pytest.raises(RowError) as caught:
        Renderer(framing).completion(messages, "so", source="f:2")
    assert str(caught.value) == (
        "f:2: the chat template cannot show messages of roles system, user: only user and assistant"
    )


def test_tools_and_arguments_reach_the_template():
    template = (
        "{% if tools %}[{{ tools[0]['name'] }}]{% endif %}{{ mood | default('') }}"
        "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"
    )
    renderer = Renderer(make_tokenizer(template), None, {"mood": "calm:"})
    tools = ({"name": "f"},)
    prompt_ids, _ = renderer.completion([user("x")], "so", tools=tools)
    assert text_of(renderer, prompt_ids) == "[f]calm:x<|im_end|>"
    assert text_of(renderer, renderer.prompt_ids([user("x")])) == "calm:x<|im_end|>"
    judged = renderer.judged_prompt_ids([user("x")], "Bad.", tools=tools)
    assert text_of(renderer, judged).startswith("[f]calm:### Instruction\nx\n")


# --- judged prompts ---


def test_judged_prompt_rewords_the_last_user_turn(tiny):
    renderer = Renderer(tiny)
    messages = [user("One?"), assistant("Yes."), user("{judgment}?")]
    assert text_of(renderer, renderer.judged_prompt_ids(messages, "Too {short}.")) == (
        "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"
        "<|im_start|>user\n### Instruction\n{judgment}?\n\n"
        "### Judgment of the response\nToo {short}.\n\n"
        "Write the response to the instruction that this judgment describes.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    with pytest.raises(RowError, match="needs a user message"):
        renderer.judged_prompt_ids([{"role": "system", "content": "S"}], "Bad.")


def test_feedback_asks_for_a_judgment_of_the_answer(tiny):
    renderer = Renderer(tiny)
    messages = [user("One?"), assistant("Yes."), user("Two?")]
    asked, judgment = renderer.feedback(messages, "No {instruction}.", "Too {short}.")
    assert text_of(renderer, asked) == (
        "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"
        "<|im_start|>user\n### Instruction\nTwo?\n\n### Response\nNo {instruction}.\n\n"
        "Write a judgment of this response.<|im_end|>\n<|im_start|>assistant\n"
    )
    assert text_of(renderer, judgment) == "Too {short}.<|im_end|>"
    with pytest.raises(RowError, match=r"f:1: field judgment: value 'a.*b': must not hold"):
        renderer.feedback(messages, "No.", "a<|im_end|>b", source="f:1")
    with pytest.raises(RowError, match="needs a user message"):
        renderer.feedback([{"role": "system", "content": "S"}], "No.", "Bad.")


def test_refining_shows_the_answer_and_its_judgment(tiny):
    renderer = Renderer(tiny)
    messages = [user("One?"), assistant("Yes."), user("Two?")]
    assert text_of(renderer, renderer.refine_prompt_ids(messages, "No.", "{completion}!")) == (
        "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"
        "<|im_start|>user\n### Instruction\nTwo?\n\n### Response\nNo.\n\n"
        "### Judgment of the response\n{completion}!\n\n"
        "Write a better response to the instruction, one that this judgment does not apply to. "
        "Write the response alone.<|im_end|>\n<|im_start|>assistant\n"
    )
    with pytest.raises(RowError, match="needs a user message"):
        renderer.refine_prompt_ids([{"role": "system", "content": "S"}], "No.", "Bad.")


def test_alpaca_prompts():
    renderer = Renderer(make_tokenizer(None), "alpaca")
    prompt_ids, completion_ids = renderer.completion([user("Add 1 and 2.")], "3")
    assert text_of(renderer, prompt_ids) == (
        "Here is an instruction. Write a response that carries it out.\n\n"
        "### Instruction:\nAdd 1 and 2.\n\n### Response:\n"
    )
    assert text_of(renderer, completion_ids) == "3</s>"
    assert text_of(renderer, renderer.judged_prompt_ids([user("Add 1 and 2.")], "Wrong.")) == (
        "Here are an instruction and a judgment of a response to it. "
        "Write the response that the judgment describes.\n\n"
        "### Instruction:\nAdd 1 and 2.\n\n### Judgment:\nWrong.\n\n### Response:\n"
    )
    asked, judgment = renderer.feedback([user("Add 1 and 2.")], "4", "Wrong.")
    assert text_of(renderer, asked) == (
        "Here are an instruction and a response to it. Write a judgment of the response.\n\n"
        "### Instruction:\nAdd 1 and 2.\n\n### Given response:\n4\n\n### Response:\n"
    )
    assert text_of(renderer, judgment) == "Wrong.</s>"
    assert text_of(renderer, renderer.refine_prompt_ids([user("Add.")], "4", "Wrong.")) == (
        "Here are an instruction, a response to it and a judgment of that response. "
        "Write a better response, one that the judgment does not apply to.\n\n"
        "### Instruction:\nAdd.\n\n### Given response:\n4\n\n### Judgment:\nWrong.\n\n"
        "### Response:\n"
    )
    own = [{"role": "system", "content": "Be brief."}, user("Add."), assistant("No."), user("Do.")]
    assert text_of(renderer, renderer.prompt_ids(own)) == (
        "Be brief.\n\n### Instruction:\nAdd.\n\n### Response:\nNo.</s>\n\n"
        "### Instruction:\nDo.\n\n### Response:\n"
    )


@pytest.mark.parametrize("name", ["chat", "alpaca"])
@pytest.mark.parametrize("answer", ANSWERS)
def test_judged_and_plain_streams_share_the_answer(name, answer):
    renderer = ANY[name]
    prompt_ids, completion_ids = renderer.completion([user("x")], answer)
    judged_ids = renderer.judged_prompt_ids([user("x")], "Bad.")
    plain = Stream.of("plain", prompt_ids, completion_ids)
    judged = Stream.of("judged", judged_ids, completion_ids)
    targets = [stream.input_ids[stream.loss_mask].tolist() for stream in (plain, judged)]
    assert targets[0] == targets[1] == completion_ids.tolist()
    assert len(judged) - len(plain) == len(judged_ids) - len(prompt_ids) > 0
    assert not judged.loss_mask[: len(judged_ids)].any()
    # Both prompts end alike, so the answer's tokens are those that either would have given.
    assert prompt_ids[-4:].tolist() == judged_ids[-4:].tolist()


# --- dialogues ---


def marked(renderer: Renderer, stream: Stream) -> str:
    """The stream's text with its targets in brackets, token by token."""
    out, inside = "", False
    for token, target in zip(stream.input_ids, stream.loss_mask, strict=True):
        if target != inside:
            out, inside = out + ("⟦" if target else "⟧"), target
        out += renderer.tokenizer.decode([token])
    return out + ("⟧" if inside else "")


def test_conversation_masks(tiny):
    renderer = Renderer(tiny)
    messages = [
        {"role": "system", "content": "S"},
        user("one"),
        assistant("1"),
        user("two"),
        assistant("2", loss=False),
        {"role": "tool", "content": "t"},
        assistant("33"),
        user("left over"),
    ]
    stream = renderer.conversation(messages)
    assert marked(renderer, stream) == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\none<|im_end|>\n"
        "<|im_start|>assistant\n⟦1<|im_end|>⟧\n<|im_start|>user\ntwo<|im_end|>\n"
        "<|im_start|>assistant\n2<|im_end|>\n<|im_start|>tool\nt<|im_end|>\n"
        "<|im_start|>assistant\n⟦33<|im_end|>⟧"
    )
    whole = tiny.apply_chat_template(messages, add_generation_prompt=False)["input_ids"]
    assert stream.input_ids.tolist() == whole[: len(stream)]


def test_conversation_in_a_text_template():
    renderer = Renderer(make_tokenizer(None), "alpaca")
    messages = [user("one"), assistant("1"), assistant("1b"), user("two"), assistant("2")]
    assert marked(renderer, renderer.conversation(messages)) == (
        "Here is an instruction. Write a response that carries it out.\n\n"
        "### Instruction:\none\n\n### Response:\n⟦1</s>⟧\n\n### Response:\n⟦1b</s>⟧\n\n"
        "### Instruction:\ntwo\n\n### Response:\n⟦2</s>⟧"
    )


def test_conversation_ends_after_split_tokens():
    """Answers that begin with line feeds keep every later prefix whole."""
    renderer = Renderer(make_tokenizer(CHATML))
    stream = renderer.conversation([user("a"), assistant("\n1"), user("b"), assistant("\n\n2\n")])
    assert marked(renderer, stream) == (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n⟦\n1<|im_end|>⟧\n"
        "<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n⟦\n\n2\n<|im_end|>⟧"
    )


def test_conversation_with_a_template_that_forgets_thoughts():
    tokenizer = make_tokenizer(THINKING)
    dialogue = [user("a"), assistant("1"), user("b"), assistant("2")]
    with pytest.raises(RowError, match=r"^f:1: the chat template does not continue its own prompt"):
        Renderer(tokenizer).conversation(dialogue, source="f:1")
    # One answer is fine, and so are earlier ones that are only shown.
    renderer = Renderer(tokenizer, None, {"enable_thinking": False})
    dialogue[1]["loss"] = False
    assert marked(renderer, renderer.conversation(dialogue)).endswith(
        "1<|im_end|>\n<|im_start|>user\nb<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n⟦2<|im_end|>⟧"
    )


def test_conversation_without_a_target(tiny):
    with pytest.raises(RowError, match=r"^f:1: field messages: no turn is trained on"):
        Renderer(tiny).conversation([user("a"), assistant("1", loss=False)], source="f:1")


# --- the judge's question ---


def test_judge_prompt(tiny):
    renderer = Renderer(tiny)
    question = (
        "<|im_start|>user\n### Conversation\nWhy?\n\n### Response A\n{a}\n\n### Response B\nb\n\n"
        "Which response is better? Answer with A or B.<|im_end|>\n"
        "<|im_start|>assistant\nThe better response is"
    )
    system = "You compare two responses to the same conversation and say which one is better"
    assert text_of(renderer, renderer.judge_prompt_ids([user("Why?")], "{a}", "b")) == (
        f"<|im_start|>system\n{system}.<|im_end|>\n{question}"
    )
    # A principle stands at the end; one without a text in the template stands for itself.
    for principle, text in (
        ("{wit}", "{wit}"),
        ("honesty", PRINCIPLES["honesty"]),
        ("Instruction_Following", PRINCIPLES["instruction following"]),
    ):
        ids = renderer.judge_prompt_ids([user("Why?")], "{a}", "b", principle)
        asked = f"### Principle\n{text}\n\nWhich response is better by this principle alone?"
        assert text_of(renderer, ids) == f"<|im_start|>system\n{system}.<|im_end|>\n" + (
            question.replace("Which response is better?", asked)
        )
        messages = renderer.judge_messages([user("Why?")], "{a}", "b", principle)
        assert [m["role"] for m in messages] == ["system", "user"]
        assert all(m["content"] in text_of(renderer, ids) for m in messages)


def common_prefix(rows: list[np.ndarray]) -> np.ndarray:
    shortest = min(map(len, rows))
    table = np.stack([row[:shortest] for row in rows])
    same = (table == table[0]).all(axis=0)
    return rows[0][: shortest if same.all() else int(same.argmin())]


@pytest.mark.parametrize("form", ["chat", "alpaca", "no system turn"])
def test_principles_share_all_tokens_up_to_their_own(tiny, framing, form):
    """What an engine's prefix cache keeps: the dialogue and both answers, for every principle."""
    renderer = Renderer(framing) if form == "no system turn" else Renderer(tiny, form)
    messages = [user("One?"), assistant("Yes."), user("Two?")]
    asked = ["overall", *PRINCIPLES, "wit"]
    rows = [
        renderer.judge_prompt_ids(
            messages, "the first", "the second", p if p != "overall" else None
        )
        for p in asked
    ]
    text = text_of(renderer, common_prefix(rows))
    # Nothing before the principle differs, not even the end of the second answer.
    assert "### Response A\nthe first\n\n### Response B\nthe second" in text
    assert text_of(renderer, common_prefix(rows[1:])).endswith("the second\n\n### Principle\n")
    assert len(set(map(bytes, rows))) == len(asked)


def test_judge_prompt_shows_every_turn_of_a_dialogue(tiny):
    renderer = Renderer(tiny)
    messages = [{"role": "system", "content": "S"}, user("One?"), assistant("Yes."), user("Two?")]
    text = text_of(renderer, renderer.judge_prompt_ids(messages, "a", "b"))
    assert "### Conversation\nSystem: S\n\nUser: One?\n\nAssistant: Yes.\n\nUser: Two?\n\n" in text


def test_judge_prompt_shows_what_is_called(tiny):
    renderer = Renderer(tiny)
    call = {"function": {"name": "clock", "arguments": {"zone": "UTC"}}}
    messages = [
        user("When?"),
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "noon"},
    ]
    text = text_of(renderer, renderer.judge_prompt_ids(messages, "a", "b"))
    assert f"Assistant: {json.dumps(call)}\n\nTool: noon" in text


@pytest.mark.parametrize("name", ["chat", "alpaca"])
def test_decision_follows_the_judge_prompt(tiny, name):
    """The verdict's id is the token that the tokenizer itself puts behind the question."""
    renderer = Renderer(tiny, name)
    ids = renderer.decision_ids()
    assert [tiny.decode([i]) for i in ids] == [" A", " B"]
    prompt = renderer.judge_prompt_ids([user("Why?")], "a", "b")
    text = text_of(renderer, prompt) + " A"
    assert tiny(text, add_special_tokens=False)["input_ids"] == [*prompt, ids[0]]


def test_decision_tokens_are_checked(tiny):
    renderer = Renderer(tiny)
    with pytest.raises(ConfigError) as caught:
        renderer.decision_ids((" A", " Bravo"))
    assert str(caught.value) == (
        "judge.decision_tokens = [' A', ' Bravo']: ' Bravo' after 't\\nThe better response is' is "
        "not one token of its own for this tokenizer: choose other texts (and name them so in "
        "judge.template), usually with their leading space"
    )
    with pytest.raises(ConfigError, match="want two different ones"):
        renderer.decision_ids((" A", " A"))


def test_judge_of_a_model_without_system_turns(framing):
    """What would be a system turn opens the user turn."""
    text = text_of(
        Renderer(framing), Renderer(framing).judge_prompt_ids([user("x")], "a", "b", "P")
    )
    assert text.startswith("<s>[INST] You compare two responses")
    assert "which one is better.\n\n### Conversation\nx\n\n### Response A\na\n" in text
    assert "### Principle\nP\n\n" in text
    assert text.endswith(" [/INST]The better response is")


# --- settings and template files ---


def test_chat_needs_a_chat_template():
    with pytest.raises(ConfigError, match="no chat template: set the dataset's template to 'alpac"):
        Renderer(make_tokenizer(None))


def test_unusable_settings(tiny):
    with pytest.raises(ConfigError, match=r"chat_template_kwargs\.tokenize is set by FastAlign"):
        Renderer(tiny, None, {"tokenize": False})
    with pytest.raises(ConfigError, match="a text template takes no arguments"):
        Renderer(tiny, "alpaca", {"mood": "calm"})
    with pytest.raises(ConfigError, match="neither a file nor one of 'chat', 'alpaca'"):
        Renderer(tiny, "alpacca")
    with pytest.raises(ConfigError, match="does not show an answer's text"):
        Renderer(make_tokenizer("{{ messages[0]['content'] }}"))
    with pytest.raises(ConfigError, match=r"cannot show messages of roles user, assistant: no\b"):
        Renderer(make_tokenizer("{{ raise_exception('no') }}"))
    with pytest.raises(RowError, match="a text template cannot show tools"):
        Renderer(tiny, "alpaca").prompt_ids([user("x")], tools=[{"name": "f"}])
    endless = make_tokenizer(ENDLESS)
    endless.eos_token = None
    for name in ("chat", "alpaca"):
        with pytest.raises(ConfigError, match="an answer would have no end"):
            Renderer(endless, name)


def test_template_file(tmp_path, tiny):
    path = tmp_path / "own.yaml"
    path.write_text(
        "system: Be kind.\nprompt: 'Q: {instruction}'\n"
        "judged_prompt: 'Q: {instruction} {{J}}: {judgment}'\n"
        "feedback_system: Judge.\nfeedback_prompt: '{completion} to {instruction}'\n"
        "refine_system: ''\nrefine_prompt: '{judgment} of {completion} to {instruction}'\n",
        encoding="utf-8",
    )
    renderer = Renderer(tiny, str(path))
    messages = [user("a"), assistant("b"), user("c")]
    start = (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nQ: a<|im_end|>\n"
        "<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nQ: c"
    )
    end = "<|im_end|>\n<|im_start|>assistant\n"
    assert text_of(renderer, renderer.prompt_ids(messages)) == start + end
    judged = text_of(renderer, renderer.judged_prompt_ids(messages, "j"))
    assert judged == start + " {J}: j" + end
    asked, _ = renderer.feedback([user("a")], "b", "j")
    assert text_of(renderer, asked) == (
        "<|im_start|>system\nJudge.<|im_end|>\n<|im_start|>user\nb to a" + end
    )
    refine = text_of(renderer, renderer.refine_prompt_ids([user("a")], "b", "j"))
    assert refine == "<|im_start|>user\nj of b to a" + end
    stream = renderer.conversation([*messages, assistant("d")])
    assert text_of(renderer, stream.input_ids[stream.loss_mask]) == "b<|im_end|>d<|im_end|>"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("promt: x", "F: promt is no key of a template: did you mean 'prompt'?"),
        ("zzz: x", "F: zzz is no key of a template: known are format, system, prompt, judged_syst"),
        ("prompt: 3", "F: prompt = 3: want text"),
        ("prompt: null", "F: prompt = None: want text"),
        ("prompt: x", "F: prompt: has no placeholder: want {instruction}"),
        ("prompt: '{instruction} {x}'", "F: prompt: has {instruction} and {x}: want {instruction}"),
        ("prompt: '{instruction!r}'", "F: prompt: has {instruction}: want {instruction}"),
        ("prompt: '{instruction'", "F: prompt: expected '}' before end of string"),
        (
            "judged_prompt: '{judgment}'",
            "F: judged_prompt: has {judgment}: want {instruction} and {judgment}",
        ),
        (
            "feedback_prompt: '{completion}'",
            "F: feedback_prompt: has {completion}: want {instruction} and {completion}",
        ),
        (
            "refine_prompt: '{instruction} {judgment}'",
            "F: refine_prompt: has {instruction} and {judgment}: want {instruction} and "
            "{completion} and {judgment}",
        ),
        ("format: html", "F: format = 'html': want 'chat' or 'text'"),
        ("response: x", "F: response and separator belong to format: text"),
        ("- x", "F: a template is a mapping of keys to values"),
        ("a: b: c", "F:1: mapping values are not allowed here"),
    ],
)
def test_template_file_errors(tmp_path, text, message):
    path = tmp_path / "own.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_template(str(path))
    assert str(caught.value).replace(str(path), "F").startswith(message)


def test_judge_template_file(tmp_path, tiny):
    path = tmp_path / "judge.yaml"
    path.write_text(
        "system: ''\nprinciple_system: '<{principle}>'\n"
        "prompt: '{dialogue}|{a}|{b}'\ndecision: 'Better:'\n",
        encoding="utf-8",
    )
    renderer = Renderer(tiny, judge_template=str(path))
    text = "<|im_start|>user\nx|y|z<|im_end|>\n<|im_start|>assistant\nBetter:"
    assert text_of(renderer, renderer.judge_prompt_ids([user("x")], "y", "z")) == text
    ids = renderer.judge_prompt_ids([user("x")], "y", "z", "P")
    assert text_of(renderer, ids) == "<|im_start|>system\n<P><|im_end|>\n" + text
    with pytest.raises(ConfigError, match="no such template"):
        Renderer(tiny, judge_template="none.yaml")


def test_a_principle_goes_where_the_file_says(tmp_path, tiny):
    path = tmp_path / "judge.yaml"
    path.write_text(
        "principle_system: Be fair.\nprinciple_prompt: '{dialogue}|{a}|{b}|{principle}'\n"
        "principles: {Wit: 'Wit: it is funny.', honesty: Never lie.}\n",
        encoding="utf-8",
    )
    template = load_judge_template(str(path))
    shown = {"dialogue": "x", "a": "{y}", "b": "z"}
    assert template.asked(None, **shown) == JudgeTemplate().asked(None, **shown)
    for principle, text in (
        ("wit", "Wit: it is funny."),
        ("honesty", "Never lie."),
        ("helpfulness", PRINCIPLES["helpfulness"]),
        ("{a}", "{a}"),
    ):
        assert template.asked(principle, **shown) == ("Be fair.", f"x|{{y}}|z|{text}")
    # A question of the file's own has no built-in sister.
    path.write_text("prompt: '{dialogue}|{a}|{b}'\n", encoding="utf-8")
    renderer = Renderer(tiny, judge_template=str(path))
    renderer.judge_prompt_ids([user("x")], "y", "z")
    with pytest.raises(ConfigError) as caught:
        renderer.judge_prompt_ids([user("x")], "y", "z", "wit")
    assert str(caught.value) == (
        "judge.template: has no {principle}, where 'wit' would stand: add principle_prompt or "
        "principle_system"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompt: '{dialogue} {a}'", "F: prompt: has {a} and {dialogue}: want {dialogue} and {a}"),
        ("prompt: null", "F: prompt = None: want text"),
        ("principles: [wit]", "F: principles = ['wit']: want a mapping of names to texts"),
        ("principles: {wit: 3}", "F: principles = {'wit': 3}: want a mapping of names to texts"),
        (
            "principle_prompt: '{a} {principle}'",
            "F: principle_prompt: has {a} and {principle}: want {dialogue} and {a} and {b} and "
            "perhaps {principle} (",
        ),
        ("principle_system: '{a}'", "F: principle_system: has {a}: want {principle} ("),
        ("rationale: '{a}'", "F: rationale: has {a}: want {a} and {b} ("),
        (
            "{principle_system: 'By {principle}', principle_prompt: '{dialogue}{a}{b}{principle}'}",
            "F: {principle} stands in principle_system and in principle_prompt: want it in one",
        ),
        (
            "principle_prompt: '{dialogue} {a} {b}'",
            "F: {principle} stands in neither principle_system nor principle_prompt: want it in o",
        ),
        (
            "principle_system: Be fair.",
            "F: {principle} stands in neither principle_system nor principle_prompt: want it in o",
        ),
    ],
)
def test_judge_template_file_errors(tmp_path, text, message):
    path = tmp_path / "own.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_judge_template(str(path))
    assert str(caught.value).replace(str(path), "F").startswith(message)


# --- what a judge is trained to say ---


@pytest.mark.parametrize(
    ("name", "end"), [("chat", "<|im_end|>"), ("alpaca", "<|im_end|>")], ids=["chat", "text"]
)
def test_a_judgment_is_the_decision_and_then_the_rationales(tiny, name, end):
    renderer = Renderer(tiny, name)
    for slot, token in enumerate((" A", " B")):
        prompt, ids = renderer.judgment([user("Why?")], "a", "b", slot, "honesty")
        assert (
            prompt.tolist()
            == renderer.judge_prompt_ids([user("Why?")], "a", "b", "honesty").tolist()
        )
        assert (ids.dtype, ids.tolist()) == (np.int32, [renderer.decision_ids()[slot]])
        _, ids = renderer.judgment([user("Why?")], "a", "b", slot, None, ("It {lies}.", "True."))
        text = f"{token}\n\nResponse A: It {{lies}}.\n\nResponse B: True.{end}"
        assert text_of(renderer, ids) == text
        assert ids[0] == renderer.decision_ids()[slot] and ids[-1] == tiny.eos_token_id
    with pytest.raises(RowError, match=r"^f:1: field comparisons: .*end-of-turn token '<\|im_end"):
        renderer.judgment([user("x")], "a", "b", 0, None, ("x<|im_end|>", "y"), source="f:1")


def test_judgments_of_other_templates_and_tokens(tiny, framing, tmp_path):
    # An end that the chat template does not write, one behind a space, other letters and words.
    endless = Renderer(make_tokenizer(ENDLESS))
    _, ids = endless.judgment([user("x")], "a", "b", 1, None, ("R", "S"))
    assert text_of(endless, ids) == " B\n\nResponse A: R\n\nResponse B: S</s>"
    _, ids = Renderer(framing).judgment([user("x")], "a", "b", 0, None, ("R", "S"))
    assert text_of(Renderer(framing), ids) == " A\n\nResponse A: R\n\nResponse B: S </s>"
    path = tmp_path / "judge.yaml"
    path.write_text("decision: 'Better:'\nrationale: ', for {b} / {a}'\n", encoding="utf-8")
    own = Renderer(tiny, judge_template=str(path))
    _, ids = own.judgment([user("x")], "y", "z", 1, None, ("R", "S"), tokens=("1", "2"))
    assert text_of(own, ids) == "2, for S / R<|im_end|>"
    # A text that would melt into the decision is tokenised behind it: it was read alone.
    path.write_text("rationale: 'n{a}{b}'\n", encoding="utf-8")
    own = Renderer(tiny, judge_template=str(path))
    _, ids = own.judgment([user("x")], "y", "z", 0, None, ("swer", ""))
    assert ids[0] == own.decision_ids()[0] and text_of(own, ids) == " Answer<|im_end|>"


# Opens a thought unless it is told not to, as Qwen 3.5 does.
OPENING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% else %}<think>\n{% endif %}{% endif %}"
)


@pytest.mark.parametrize("template", [OPENING, THINKING], ids=["opening", "silent"])
@pytest.mark.parametrize("kwargs", [None, {"enable_thinking": True}, {"enable_thinking": False}])
def test_judges_do_not_think(tiny_llama, template, kwargs):
    """The decision follows its opening, whatever the rows of the dataset are rendered with."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = template
    renderer = Renderer(tokenizer, None, kwargs)
    closed = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    thought = "<think>\nhm\n</think>\nyes"
    text = text_of(renderer, renderer.judge_prompt_ids([user("x")], thought, "b", "honesty"))
    assert text.endswith(f"A or B.<|im_end|>\n{closed}The better response is")
    # An answer's own thought is part of what is judged.
    assert text.count("<think>") == 2 and thought in text
    written = text_of(renderer, renderer.written_prompt_ids([user("x")], thought))
    assert written.endswith(closed) and thought in written
    prompt, ids = renderer.judgment([user("x")], "a", "b", 0, None, ("R", "S"))
    assert text_of(renderer, prompt).endswith(f"{closed}The better response is")
    assert text_of(renderer, ids) == " A\n\nResponse A: R\n\nResponse B: S<|im_end|>"
    # What is trained on and sampled is as the dataset says.
    on = "<think>\n" if template is OPENING else ""
    plain = closed if kwargs == {"enable_thinking": False} else f"<|im_start|>assistant\n{on}"
    assert text_of(renderer, renderer.prompt_ids([user("x")])).endswith(f"<|im_end|>\n{plain}")


@pytest.mark.parametrize(
    ("reply", "judgment"),
    [
        ("The response is perfect.", None),
        (" the response\nis PERFECT", None),
        ('**"The response is perfect!"**', None),
        ("The response is perfect. It adds the numbers up.", None),
        # What begins with the words, not with the letters.
        ("The response is perfectly wrong.", "The response is perfectly wrong."),
        ("It says: the response is perfect.", "It says: the response is perfect."),
        # Praise that is taken back was seen in the published data, and is a judgment there too.
        ("The response is perfect, but too long.", "The response is perfect, but too long."),
        ("\n It is wrong. \n", "It is wrong."),
    ],
)
def test_what_a_judge_says_when_nothing_is_wrong(reply, judgment):
    assert WrittenTemplate().judgment(reply) == judgment
    assert WrittenTemplate(fine=()).judgment(reply) == reply.strip()


def test_fine_takes_several_phrases():
    template = WrittenTemplate(fine=("OK.", "Nichts zu tadeln"))
    assert [template.judgment(x) for x in ("ok", "NICHTS zu tadeln!", "Okay")] == [
        None,
        None,
        "Okay",
    ]


def test_written_template_file(tmp_path, tiny):
    path = tmp_path / "judge.yaml"
    path.write_text("system: S\nprompt: '{dialogue}|{answer}'\nfine: [Gut]\n", encoding="utf-8")
    renderer = Renderer(tiny, written_template=str(path))
    assert renderer.written == WrittenTemplate("S", "{dialogue}|{answer}", ("Gut",))
    messages = [user("a"), assistant("b"), user("c")]
    text = "User: a\n\nAssistant: b\n\nUser: c|d"
    assert renderer.written_messages(messages, "d") == [
        {"role": "system", "content": "S"},
        {"role": "user", "content": text},
    ]
    assert text_of(renderer, renderer.written_prompt_ids(messages, "d")) == (
        f"<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n{text}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    # A template without a system turn of its own, and a tokenizer without a chat template.
    without = Renderer(make_tokenizer(LLAMA2), written_template=str(path))
    shown = text_of(without, without.written_prompt_ids([user("a")], "d"))
    assert "[INST] S\n\na|d [/INST]" in shown
    plain = Renderer(make_tokenizer(None), "alpaca", written_template=str(path))
    assert text_of(plain, plain.written_prompt_ids([user("a")], "d")).endswith(
        "S\n\n### Instruction:\na|d\n\n### Response:\n"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fine: perfect", "F: fine = 'perfect': want a list of texts"),
        ("fine: [perfect, 3]", "F: fine = ['perfect', 3]: want a list of texts"),
        ("fine: [perfect, '!']", "F: fine has '!': every reply would begin with it"),
        ("prompt: '{dialogue}'", "F: prompt: has {dialogue}: want {dialogue} and {answer}"),
        ("decision: x", "F: decision is no key of a template: known are system, prompt, fine"),
    ],
)
def test_written_template_file_errors(tmp_path, text, message):
    path = tmp_path / "judge.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_written_template(str(path))
    assert str(caught.value).replace(str(path), "F").startswith(message)


def test_built_in_templates_obey_their_own_rules(tmp_path):
    import dataclasses

    import yaml

    path = tmp_path / "copy.yaml"
    for template in TEMPLATES.values():
        path.write_text(yaml.safe_dump(dataclasses.asdict(template)), encoding="utf-8")
        assert load_template(str(path)) == template
    path.write_text(yaml.safe_dump(dataclasses.asdict(JudgeTemplate())), encoding="utf-8")
    assert Renderer(make_tokenizer(CHATML), judge_template=str(path)).judge == JudgeTemplate()
    written = dataclasses.asdict(WrittenTemplate())
    path.write_text(yaml.safe_dump(written | {"fine": list(written["fine"])}), encoding="utf-8")
    assert load_written_template(str(path)) == WrittenTemplate()
    # What the prompt asks for is what is understood.
    asked = WrittenTemplate().prompt.rpartition("exactly: ")[2]
    assert asked and WrittenTemplate().judgment(asked) is None


# --- truncation ---


def test_fit():
    prompt, answer = np.arange(5, dtype=np.int32), np.arange(10, 14, dtype=np.int32)
    assert fit(prompt, answer, 9).tolist() == [10, 11, 12, 13]
    assert fit(prompt, answer, 7).tolist() == [10, 11]
    assert fit(prompt, answer, 6).tolist() == [10]
    assert fit(prompt, answer, 5) == fit(prompt, answer, 2) == NO_ROOM
    assert fit(prompt, answer[:0], 9) == NO_ANSWER


def test_fit_stream(tiny):
    renderer = Renderer(tiny)
    stream = renderer.conversation([user("a"), assistant("bcd"), user("e"), assistant("f")])
    first, *_, last = np.flatnonzero(stream.loss_mask)
    assert fit_stream(stream, len(stream)) is stream
    # What is cut behind the last target that is left has no use.
    cut = fit_stream(stream, last - 1)
    assert marked(renderer, cut).endswith("⟦bcd<|im_end|>⟧")
    shorter = fit_stream(stream, first + 2)
    assert shorter.input_ids.tolist() == stream.input_ids[: first + 2].tolist()
    assert shorter.loss_mask.tolist() == stream.loss_mask[: first + 2].tolist()
    assert fit_stream(stream, first) == CUT_OFF
