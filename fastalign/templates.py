"""Messages become token ids: chat templates, text templates, judged prompts, judge prompts.

Every wording is data: :data:`TEMPLATES`, :class:`JudgeTemplate` and :class:`WrittenTemplate` below,
or a YAML file with the same keys.  The code holds one rule for all of them: a prompt is always a
token prefix of whatever continues it, and what a row trains on begins exactly where the prompt
ends.  A template that breaks the rule for a row is an error that names the row, never a shifted
mask.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import re
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from fastalign.config import ConfigError, read_yaml
from fastalign.data import Message, RowError, Stream, takes_back
from fastalign.printing import short

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]] | None

NO_ANSWER = "completion: empty"
NO_ROOM = "max_length: the prompt leaves no room for an answer"
CUT_OFF = "max_length: nothing that is trained on is left after truncation"


@dataclass(frozen=True)
class Template:
    """How prompts are worded.  The keys of a YAML template file are these fields.

    With ``format: chat`` the messages, worded as below, go through the tokenizer's chat template.
    With ``format: text`` they are joined as they stand: the system text and a blank line, each user
    turn, ``response`` with the answer and the tokenizer's end-of-sequence token, ``separator``
    before the next turn.
    """

    format: Literal["chat", "text"] = "chat"
    system: str = ""
    """System text when the dialogue brings none; empty: none."""
    prompt: str = "{instruction}"
    """Every user turn; {instruction} is its text."""
    judged_system: str | None = None
    """As ``system`` where a judgment is shown; null: the same text."""
    judged_prompt: str = (
        "### Instruction\n{instruction}\n\n"
        "### Judgment of the response\n{judgment}\n\n"
        "Write the response to the instruction that this judgment describes."
    )
    """The last user turn where a judgment is shown (arXiv 2312.14591, section 3)."""
    feedback_system: str | None = None
    """As ``system`` where a judgment is asked for; null: the same text."""
    feedback_prompt: str = (
        "### Instruction\n{instruction}\n\n"
        "### Response\n{completion}\n\n"
        "Write a judgment of this response."
    )
    """The last user turn where a judgment of an answer is asked for (forward prediction)."""
    refine_system: str | None = None
    """As ``system`` where a better answer is asked for; null: the same text."""
    refine_prompt: str = (
        "### Instruction\n{instruction}\n\n"
        "### Response\n{completion}\n\n"
        "### Judgment of the response\n{judgment}\n\n"
        "Write a better response to the instruction, one that this judgment does not apply to. "
        "Write the response alone."
    )
    """The last user turn where a better answer is asked for (ILF)."""
    response: str = ""
    """Text format: what opens an answer."""
    separator: str = ""
    """Text format: what stands between an answer and the next turn."""

    placeholders: ClassVar[dict[str, tuple[str, ...]]] = {
        "prompt": ("instruction",),
        "judged_prompt": ("instruction", "judgment"),
        "feedback_prompt": ("instruction", "completion"),
        "refine_prompt": ("instruction", "completion", "judgment"),
    }


PRINCIPLES: Mapping[str, str] = {
    "helpfulness": "Helpfulness: the response gives the user what they are after, clearly, "
    "completely and to the point.",
    "honesty": "Honesty: the response sounds as sure as it has reason to be, and says so where it "
    "does not know.",
    "instruction following": "Instruction following: the response does what was asked, in the form "
    "and within the limits that were set.",
    "truthfulness": "Truthfulness: what the response states is true and agrees with what it was "
    "given, and nothing in it is made up.",
}
"""The principles by which UltraFeedback rates (arXiv 2310.01377), in words of our own."""


@dataclass(frozen=True)
class JudgeTemplate:
    """How two answers are put before a judge, C(x, a, b) of arXiv 2402.11253, section 3.1.

    The assistant's turn is opened with ``decision``, so that the next token is the verdict.  A
    principle stands at the end of the question, so that an engine's prefix cache keeps dialogue and
    answers for all principles; the paper's layout has it in ``principle_system``.
    """

    system: str = "You compare two responses to the same conversation and say which one is better."
    """System text; empty: none."""
    principle_system: str | None = None
    """System text when one principle is judged; null: the same text."""
    prompt: str = (
        "### Conversation\n{dialogue}\n\n### Response A\n{a}\n\n### Response B\n{b}\n\n"
        "Which response is better? Answer with A or B."
    )
    """The question; {dialogue} is the prompt's text, or its turns with their roles."""
    principle_prompt: str | None = (
        "### Conversation\n{dialogue}\n\n### Response A\n{a}\n\n### Response B\n{b}\n\n"
        "### Principle\n{principle}\n\n"
        "Which response is better by this principle alone? Answer with A or B."
    )
    """The question when one principle is judged; null: the same one.  A file that words ``prompt``
    or ``principle_system`` has none but its own.  {principle} stands here or in
    ``principle_system``."""
    principles: Mapping[str, str] = field(default_factory=lambda: PRINCIPLES)
    """What {principle} says, by name; any other principle stands for itself.  The names of a file
    are added to the built-in ones."""
    decision: str = "The better response is"
    """What the assistant has said already; empty: the verdict is its first token."""
    rationale: str = "\n\nResponse A: {a}\n\nResponse B: {b}"
    """What JSFT trains on behind the verdict where a comparison gives reasons: {a} and {b} are
    those of the answers in these slots."""

    placeholders: ClassVar[dict[str, tuple[str, ...]]] = {
        "principle_system": (),
        "prompt": ("dialogue", "a", "b"),
        "principle_prompt": ("dialogue", "a", "b"),
        "rationale": ("a", "b"),
    }
    optional: ClassVar[dict[str, tuple[str, ...]]] = {
        "principle_system": ("principle",),
        "principle_prompt": ("principle",),
    }

    def asked(self, principle: str | None, **shown: str) -> tuple[str, str]:
        """(system text, question) of a comparison under one principle, or overall.

        Raises:
            ConfigError: the template has no place for a principle.
        """
        if principle is None:
            return self.system, self.prompt.format(**shown)
        if not self.names_principle():
            raise ConfigError(
                f"judge.template: has no {{principle}}, where {principle!r} would stand: add "
                "principle_prompt or principle_system"
            )
        text = self.principles.get(principle_name(principle), principle)
        system, prompt = self.principle_system, self.principle_prompt
        return (
            self.system if system is None else system.format(principle=text),
            (self.prompt if prompt is None else prompt).format(principle=text, **shown),
        )

    def names_principle(self) -> tuple[str, ...]:
        """The fields in which {principle} stands."""
        return tuple(
            name
            for name in ("principle_system", "principle_prompt")
            if "principle" in _placeholders(getattr(self, name) or "")
        )


def principle_name(name: str) -> str:
    """Case and underscores make no other principle: UltraFeedback writes instruction_following."""
    return name.replace("_", " ").casefold().strip()


def _placeholders(text: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}


@dataclass(frozen=True)
class WrittenTemplate:
    """How one answer is put before a judge who writes, and which of its replies mean that nothing
    is wrong (CUT, arXiv 2312.14591, section 4.2)."""

    system: str = "You judge a response to a conversation."
    """System text; empty: none."""
    prompt: str = (
        "### Conversation\n{dialogue}\n\n### Response\n{answer}\n\n"
        "Say in one or two sentences what is wrong with the response. If nothing is, answer with "
        "exactly: The response is perfect."
    )
    """The question; {dialogue} is the prompt's text, or its turns with their roles."""
    fine: tuple[str, ...] = ("The response is perfect",)
    """An answer is fine when the words of the reply are or begin with those of one of these,
    whatever the punctuation and case, and the rest takes nothing back ("perfect, but ...")."""

    placeholders: ClassVar[dict[str, tuple[str, ...]]] = {"prompt": ("dialogue", "answer")}

    def judgment(self, reply: str) -> str | None:
        """What a reply says is wrong, or None when it says that the answer is fine."""
        said = _words(reply)
        for phrase in map(_words, self.fine):
            rest = " ".join(said[len(phrase) :])
            if said[: len(phrase)] == phrase and not takes_back(rest):
                return None
        return reply.strip()


def _words(text: str) -> list[str]:
    return re.sub(r"[\W_]+", " ", text).casefold().split()


TEMPLATES: Mapping[str, Template] = {
    "chat": Template(),
    "alpaca": Template(
        format="text",
        system="Here is an instruction. Write a response that carries it out.",
        prompt="### Instruction:\n{instruction}\n\n",
        judged_system=(
            "Here are an instruction and a judgment of a response to it. "
            "Write the response that the judgment describes."
        ),
        judged_prompt="### Instruction:\n{instruction}\n\n### Judgment:\n{judgment}\n\n",
        feedback_system=(
            "Here are an instruction and a response to it. Write a judgment of the response."
        ),
        feedback_prompt="### Instruction:\n{instruction}\n\n### Given response:\n{completion}\n\n",
        refine_system=(
            "Here are an instruction, a response to it and a judgment of that response. "
            "Write a better response, one that the judgment does not apply to."
        ),
        refine_prompt=(
            "### Instruction:\n{instruction}\n\n### Given response:\n{completion}\n\n"
            "### Judgment:\n{judgment}\n\n"
        ),
        response="### Response:\n",
        separator="\n\n",
    ),
}

_RESERVED = (
    "conversation", "messages", "tools", "tokenize", "add_generation_prompt",
    "continue_final_message", "return_tensors", "return_dict", "chat_template",
)  # fmt: skip
_PROBE = "kqzvprobe"


class JudgeWording:
    """The words of a comparison, for a judge that brings its own tokenizer, as a server does."""

    def __init__(self, judge_template: str | None = None) -> None:
        """``judge_template``: path of a YAML file with the keys of :class:`JudgeTemplate`."""
        self.judge = load_judge_template(judge_template)

    def judge_messages(
        self, messages: Messages, a: str, b: str, principle: str | None = None
    ) -> list[Message]:
        """The comparison of two answers as a system turn and a question, in the words that
        :meth:`Renderer.judge_prompt_ids` puts before the model itself."""
        return _asked(*self._judge_question(messages, a, b, principle))

    def _judge_question(
        self, messages: Messages, a: str, b: str, principle: str | None
    ) -> tuple[str, str]:
        return self.judge.asked(principle, dialogue=_transcript(messages), a=a, b=b)


class Renderer(JudgeWording):
    """Token ids of prompts, answers and dialogues for one tokenizer and one template.

    Args:
        tokenizer: A Hugging Face tokenizer.
        template: "chat", "alpaca" or the path of a YAML file with the keys of :class:`Template`;
            None is "chat".
        chat_template_kwargs: Passed on to the tokenizer's chat template.  Judges never think:
            where the template knows ``enable_thinking`` it is False for what they are asked,
            whatever stands here.
        judge_template: Path of a YAML file with the keys of :class:`JudgeTemplate`.
        written_template: Path of a YAML file with the keys of :class:`WrittenTemplate`.
        eos_ids: Further token ids that end a turn, those of the model's generation config.

    Attributes:
        eos_ids: Every token id that ends a turn.

    Raises:
        ConfigError: no chat template to use, or one that does not show the assistant's text; a
            template file with unknown keys or placeholders; a tokenizer without an end token.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        *,
        judge_template: str | None = None,
        written_template: str | None = None,
        eos_ids: Iterable[int] = (),
    ) -> None:
        self.tokenizer = tokenizer
        self.template = load_template(template)
        super().__init__(judge_template)
        self.written = load_written_template(written_template)
        self._kwargs = dict(chat_template_kwargs or {})
        # A judge is read by the token that follows; its own thoughts would stand there.
        knows_thinking = "enable_thinking" in str(tokenizer.chat_template)
        self._judge_kwargs = self._kwargs | ({"enable_thinking": False} if knows_thinking else {})
        self._bos: list[int] = []
        self._decisions: dict[tuple[str, ...], tuple[int, int]] = {}
        if self.template.format == "chat":
            self._check_chat()
        else:
            self._check_text()
        self._shows_system = self._find_system_turn()
        # The text that a template puts behind an answer, and how much of it the answer ends with.
        self._suffix, self._turn_end = self._find_turn_end()
        end_id = tokenizer.eos_token_id
        if self._turn_end:
            end_id = self._tokenize(self._turn_end)[-1]
        if end_id is None:
            raise ConfigError(
                f"{self._name()}: the template puts no special token behind an answer and the "
                "tokenizer has no eos_token: an answer would have no end"
            )
        self._end_id = int(end_id)
        known = {self._end_id, *eos_ids}
        if tokenizer.eos_token_id is not None:
            known.add(tokenizer.eos_token_id)
        self.eos_ids = frozenset(int(token) for token in known)

    # --- prompts ---

    def prompt_ids(self, messages: Messages, tools: Tools = None) -> np.ndarray:
        """The prompt up to where the assistant begins to answer, int32 [P].

        Raises:
            RowError: the template cannot show these messages.
        """
        return self._encode(self._render(self._worded(messages), tools, open_answer=True))

    def judged_prompt_ids(
        self,
        messages: Messages,
        judgment: str,
        tools: Tools = None,
    ) -> np.ndarray:
        """The prompt that also shows the judgment of the answer to come, int32 [P].

        The last user turn is reworded by the template's ``judged_prompt``.  Followed by the
        completion ids of the plain prompt it is the judged stream of CUT (arXiv 2312.14591).

        Raises:
            RowError: there is no user turn, or the template cannot show these messages.
        """
        worded = self._worded(messages, "judged", judgment=judgment)
        return self._encode(self._render(worded, tools, open_answer=True))

    def refine_prompt_ids(
        self, messages: Messages, completion: str, judgment: str, tools: Tools = None
    ) -> np.ndarray:
        """The prompt that shows an answer and its judgment and asks for a better one, int32 [P].

        The last user turn is reworded by the template's ``refine_prompt`` (ILF, arXiv 2312.14591,
        equation 2).

        Raises:
            RowError: there is no user turn, or the template cannot show these messages.
        """
        worded = self._worded(messages, "refine", completion=completion, judgment=judgment)
        return self._encode(self._render(worded, tools, open_answer=True))

    def judge_prompt_ids(
        self,
        messages: Messages,
        a: str,
        b: str,
        principle: str | None = None,
        tools: Tools = None,
    ) -> np.ndarray:
        """The question which of two answers is better, up to the decision token, int32 [P].

        C(x, a, b) of arXiv 2402.11253; the next token is one of :meth:`decision_ids`.
        ``principle`` is a name of the judge template's ``principles`` or a text of its own; None
        judges overall.

        Raises:
            RowError: the chat template cannot show the question (no system turn, for example).
            ConfigError: the judge template has no place for a principle.
        """
        return self._encode(self._judge_text(messages, a, b, principle, tools))

    def judgment(
        self,
        messages: Messages,
        a: str,
        b: str,
        slot: int,
        principle: str | None = None,
        rationales: tuple[str, str] | None = None,
        tools: Tools = None,
        source: str = "",
        tokens: Sequence[str] = (" A", " B"),
    ) -> tuple[np.ndarray, np.ndarray]:
        """(judge prompt ids, ids of the judgment), int32 [P] and [J].

        The judgment begins with the decision token, that of ``tokens`` for the better ``slot``.
        With ``rationales``, of ``a`` and of ``b``, these and the turn's end follow (PR of arXiv
        2402.11253); without, J = 1.

        Raises:
            RowError: naming ``source``, as :meth:`judge_prompt_ids`; or the rationales cannot be
                tokenised behind the decision, or hold an end token.
            ConfigError: as :meth:`judge_prompt_ids` and :meth:`decision_ids`.
        """
        asked = self._judge_text(messages, a, b, principle, tools, source)
        prompt_ids = self._encode(asked)
        decided_ids = np.append(prompt_ids, np.int32(self.decision_ids(tokens)[slot]))
        if rationales is None:
            return prompt_ids, decided_ids[len(prompt_ids) :]
        decided = asked + tokens[slot]
        reasons = self.judge.rationale.format(a=rationales[0], b=rationales[1])
        ids = self._extend(decided_ids, decided, decided + reasons + self._turn_end, source)
        ids = self._with_end(ids[len(prompt_ids) :])
        self._check_one_end(ids, "comparisons", reasons, source)
        return prompt_ids, ids

    def written_prompt_ids(
        self, messages: Messages, answer: str, tools: Tools = None
    ) -> np.ndarray:
        """The question what is wrong with an answer, up to where the judge begins, int32 [P].

        Raises:
            RowError: the chat template cannot show the question.
        """
        question = self._written_question(messages, answer)
        return self._encode(self._question_text(self.written.system, question, tools))

    def decision_ids(self, tokens: Sequence[str] = (" A", " B")) -> tuple[int, int]:
        """The ids of the two verdicts, as the tokenizer writes them behind the judge prompt.

        Raises:
            ConfigError: a verdict is not one token there, or both are the same one.
        """
        if tuple(tokens) in self._decisions:
            return self._decisions[tuple(tokens)]
        text = self._judge_text([{"role": "user", "content": "x"}], "y", "z", None, None)
        before = self._encode(text)
        ids: list[int] = []
        for token in tokens:
            after = self._encode(text + token)
            if len(after) != len(before) + 1 or not np.array_equal(after[:-1], before):
                raise ConfigError(
                    f"judge.decision_tokens = {list(tokens)}: {token!r} after {text[-24:]!r} is "
                    "not one token of its own for this tokenizer: choose other texts (and name "
                    "them so in judge.template), usually with their leading space"
                )
            ids.append(int(after[-1]))
        if len(ids) != 2 or ids[0] == ids[1]:
            raise ConfigError(
                f"judge.decision_tokens = {list(tokens)}: token ids {ids}: want two different ones"
            )
        self._decisions[tuple(tokens)] = (ids[0], ids[1])
        return ids[0], ids[1]

    # --- answers ---

    def completion(
        self,
        messages: Messages,
        completion: str,
        tools: Tools = None,
        source: str = "",
        judgment: str | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """(prompt ids, completion ids), int32 [P] and [C], the turn's end token included.

        What the template writes behind the end token (a line feed, usually) is cut.  With a
        ``judgment`` the prompt is the one that shows it (:meth:`judged_prompt_ids`).

        Raises:
            RowError: naming ``source``: the prompt is no prefix of prompt and answer, the answer
                holds an end token, or the template cannot show these messages.
        """
        shown = {} if judgment is None else {"judgment": judgment}
        worded = self._worded(messages, "judged" if shown else None, **shown)
        return self._answered(worded, "completion", completion, tools, source)

    def feedback(
        self,
        messages: Messages,
        completion: str,
        judgment: str,
        tools: Tools = None,
        source: str = "",
    ) -> tuple[np.ndarray, np.ndarray]:
        """As :meth:`completion`, where the answer is the judgment of ``completion``.

        The last user turn is reworded by the template's ``feedback_prompt`` (forward prediction,
        arXiv 2312.14591, equation 1).

        Raises:
            RowError: as :meth:`completion`, or there is no user turn.
        """
        worded = self._worded(messages, "feedback", completion=completion)
        return self._answered(worded, "judgment", judgment, tools, source)

    def _answered(
        self, worded: list[Message], field: str, text: str, tools: Tools, source: str
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids of worded messages and of the text that answers them, the row's ``field``."""
        answer = {"role": "assistant", "content": text}
        before = self._render(worded, tools, open_answer=True, source=source)
        after = self._render([*worded, answer], tools, open_answer=False, source=source)
        prompt_ids = self._encode(before)
        ids = self._extend(prompt_ids, before, self._to_turn_end(after, source), source)
        completion_ids = self._with_end(ids[len(prompt_ids) :])
        self._check_one_end(completion_ids, field, text, source)
        return prompt_ids, completion_ids

    def judged_completion(
        self,
        messages: Messages,
        completion: str,
        judgment: str,
        tools: Tools = None,
        source: str = "",
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(prompt ids, judged prompt ids, completion ids) of an answer that is read behind both.

        CUT (arXiv 2312.14591, section 3) compares the two token by token, so both prompts have to
        be followed by the same ones.

        Raises:
            RowError: as :meth:`completion`.
            ConfigError: naming ``source``: the template writes or tokenises the answer otherwise
                behind the judged prompt, from the token on that is shown.
        """
        prompt_ids, ids = self.completion(messages, completion, tools, source)
        judged_ids, other = self.completion(messages, completion, tools, source, judgment)
        if not np.array_equal(ids, other):
            pairs = enumerate(zip(ids, other, strict=False))
            at = next((i for i, (x, y) in pairs if x != y), min(len(ids), len(other)))
            plain, judged = (
                self.tokenizer.convert_ids_to_tokens(x[at : at + 3].tolist()) for x in (ids, other)
            )
            raise ConfigError(
                f"{source}: the template changes the answer with the prompt: from its token "
                f"{at + 1} on it reads {plain} behind the prompt and {judged} behind the one that "
                "shows the judgment; CUT needs the same tokens in both: change the template"
            )
        return prompt_ids, judged_ids, ids

    def conversation(
        self,
        messages: Messages,
        tools: Tools = None,
        source: str = "",
    ) -> Stream:
        """A whole dialogue; targets are the assistant's turns with their end tokens.

        Turns with ``"loss": false`` are shown and not trained on.  The stream ends with the last
        target.

        Raises:
            RowError: naming ``source``: the template rewrites earlier turns as the dialogue grows,
                so that what was trained on is not what later turns see; or no turn is trained on.
        """
        worded = self._worded(messages)
        ids, text = np.zeros(0, np.int32), ""
        spans: list[tuple[int, int]] = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant" or message.get("loss") is False:
                continue
            # The template's system text may stand before the first message.
            upto = i + len(worded) - len(messages)
            before = self._render(worded[:upto], tools, open_answer=True, source=source)
            after = self._render(worded[: upto + 1], tools, open_answer=False, source=source)
            after = self._to_turn_end(after, source)
            prompt_ids = self._extend(ids, text, before, source)
            ids, text = self._extend(prompt_ids, before, after, source), after
            self._check_one_end(ids[len(prompt_ids) :], "completion", message["content"], source)
            spans.append((len(prompt_ids), len(ids)))
        if not spans:
            raise RowError(
                f"{source}: field messages: no turn is trained on", "messages: no answer"
            )
        if not self._turn_end:
            ids = self._with_end(ids)
            spans.append((len(ids) - 1, len(ids)))
        mask = np.zeros(len(ids), np.bool_)
        for start, end in spans:
            mask[start:end] = True
        return Stream("plain", ids, mask)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of completion ids, without special tokens."""
        return self._decode([int(token) for token in ids], skip_special_tokens=True)

    def token_texts(self, ids: Sequence[int] | np.ndarray) -> list[str]:
        """The text of each token, special ones included; joined they are the text of all.

        A character that several tokens make up is the text of the last of them, and the others
        have none.
        """
        texts: list[str] = []
        # Each token is decoded behind those that were written last: alone it may lose its space.
        start = end = 0
        for i in range(1, len(ids) + 1):
            text = self._decode(ids[start:i], skip_special_tokens=False)
            if text.endswith("\ufffd") and i < len(ids):
                texts.append("")
                continue
            before = self._decode(ids[start:end], skip_special_tokens=False)
            texts.append(text[len(before) :])
            start, end = end, i
        return texts

    # --- rendering ---

    def _worded(
        self,
        messages: Messages,
        form: Literal["judged", "feedback", "refine"] | None = None,
        **shown: str,
    ) -> list[Message]:
        """The messages in the template's words.

        ``form`` rewords the last user turn, so that it also shows ``shown``.
        """
        template = self.template
        worded = [{k: v for k, v in message.items() if k != "loss"} for message in messages]
        users = [i for i, message in enumerate(worded) if message["role"] == "user"]
        for i in users:
            worded[i]["content"] = template.prompt.format(instruction=worded[i]["content"])
        system = template.system
        if form is not None:
            if not users:
                raise RowError("field prompt: needs a user message", "prompt: no user message")
            last = users[-1]
            worded[last]["content"] = getattr(template, f"{form}_prompt").format(
                instruction=messages[last]["content"], **shown
            )
            own = getattr(template, f"{form}_system")
            system = system if own is None else own
        if not worded or worded[0]["role"] not in ("system", "developer"):
            self._open_with(system, worded)
        return worded

    def _open_with(self, system: str, messages: list[Message]) -> None:
        """Put a system text of ours before the messages: a turn of its own, or the beginning of
        the first user turn where the chat template knows no system turn (Gemma, Mistral)."""
        if not system:
            return
        if self._shows_system:
            messages.insert(0, {"role": "system", "content": system})
            return
        first = next((message for message in messages if message["role"] == "user"), None)
        if first is not None:
            first["content"] = f"{system}\n\n{first['content']}"

    def written_messages(self, messages: Messages, answer: str) -> list[Message]:
        """The question of :meth:`written_prompt_ids` as a system turn and a user turn."""
        return _asked(self.written.system, self._written_question(messages, answer))

    def _judge_text(
        self,
        messages: Messages,
        a: str,
        b: str,
        principle: str | None,
        tools: Tools,
        source: str = "",
    ) -> str:
        system, question = self._judge_question(messages, a, b, principle)
        return self._question_text(system, question, tools, source) + self.judge.decision

    def _written_question(self, messages: Messages, answer: str) -> str:
        return self.written.prompt.format(dialogue=_transcript(messages), answer=answer)

    def _question_text(self, system: str, question: str, tools: Tools, source: str = "") -> str:
        if self.template.format == "text":
            question = self.template.prompt.format(instruction=question)
        asked = [{"role": "user", "content": question}]
        self._open_with(system, asked)
        return self._render(asked, tools, open_answer=True, source=source, judges=True)

    def _render(
        self,
        messages: Messages,
        tools: Tools,
        *,
        open_answer: bool,
        source: str = "",
        judges: bool = False,
    ) -> str:
        where = f"{source}: " if source else ""
        if self.template.format == "text":
            return self._render_text(messages, tools, open_answer, where)
        try:
            return self.tokenizer.apply_chat_template(
                list(messages),
                tools=list(tools) if tools else None,
                tokenize=False,
                add_generation_prompt=open_answer,
                **(self._judge_kwargs if judges else self._kwargs),
            )
        except Exception as error:  # a template's own code may raise anything
            roles = ", ".join(message["role"] for message in messages)
            raise RowError(
                f"{where}the chat template cannot show messages of roles {roles}: {error}",
                "chat template: refuses the messages",
            ) from None

    def _render_text(
        self,
        messages: Messages,
        tools: Tools,
        open_answer: bool,
        where: str,
    ) -> str:
        if tools or any(m["role"] == "tool" or m.get("tool_calls") for m in messages):
            raise RowError(
                f"{where}a text template cannot show tools: set the dataset's template to chat",
                "text template: tools",
            )
        template, parts = self.template, []
        for i, message in enumerate(messages):
            if i and messages[i - 1]["role"] == "assistant":
                parts.append(template.separator)
            if message["role"] == "assistant":
                parts += [template.response, message["content"], self.tokenizer.eos_token]
            elif message["role"] == "user":
                parts.append(message["content"])
            else:
                parts.append(message["content"] + "\n\n")
        if open_answer:
            after_answer = bool(messages) and messages[-1]["role"] == "assistant"
            parts += [template.separator if after_answer else "", template.response]
        return "".join(parts)

    # --- tokens ---

    def _tokenize(self, text: str) -> list[int]:
        # verbose=False: longer than the model's limit is not news before truncation.
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _encode(self, text: str) -> np.ndarray:
        """Token ids of a rendered text.  A chat template writes its own BOS into the text."""
        return np.asarray([*self._bos, *self._tokenize(text)], np.int32)

    def _decode(self, ids: Sequence[int] | np.ndarray, *, skip_special_tokens: bool) -> str:
        return self.tokenizer.decode(
            ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )

    def _extend(self, ids: np.ndarray, before: str, after: str, source: str) -> np.ndarray:
        """Ids of ``after`` that begin with ``ids``, the ids of ``before``."""
        if not after.startswith(before):
            pairs = enumerate(zip(before, after, strict=False))
            at = next((i for i, (x, y) in pairs if x != y), len(after))
            raise RowError(
                f"{source}: the chat template does not continue its own prompt: from character "
                f"{at} the prompt has {before[at : at + 24]!r} and the dialogue "
                f"{after[at : at + 24]!r}: a template that rewrites earlier turns cannot be "
                "trained on as one dialogue (give each answer as a row of its own)",
                "chat template: the prompt is no prefix",
            )
        whole = self._encode(after)
        if np.array_equal(whole[: len(ids)], ids):
            return whole
        # A token runs across the boundary (an answer that begins with a line feed, say).  A model
        # that continues ``ids`` cannot produce it, so the rest is tokenised on its own, provided
        # that this writes the same text: SentencePiece would put a space there.
        joined = np.concatenate([ids, np.asarray(self._tokenize(after[len(before) :]), np.int32)])
        texts = [self._decode(x, skip_special_tokens=False) for x in (joined, whole)]
        if texts[0] != texts[1]:
            pairs = enumerate(zip(ids, whole, strict=False))
            at = next((i for i, (x, y) in pairs if x != y), len(whole))
            have, want = (
                self._decode(x[at : at + 3], skip_special_tokens=False) for x in (ids, whole)
            )
            raise RowError(
                f"{source}: the tokens of the prompt are no prefix of those of the prompt and its "
                f"answer: from token {at} on they read {have!r} and {want!r}",
                "tokenizer: the prompt is no prefix",
            )
        return joined

    def _to_turn_end(self, text: str, source: str) -> str:
        """A rendered dialogue that ends with an answer, up to its end-of-turn token."""
        if not text.endswith(self._suffix):
            raise RowError(
                f"{source}: the chat template ends this answer with {text[-24:]!r} and others "
                f"with {self._suffix!r}",
                "chat template: the answer has another end",
            )
        return text[: len(text) - len(self._suffix)] + self._turn_end

    def _with_end(self, ids: np.ndarray) -> np.ndarray:
        """The ids of an answer with its end, which some templates do not write."""
        return ids if self._turn_end else np.append(ids, np.int32(self._end_id))

    def _check_one_end(self, answer_ids: np.ndarray, field: str, answer: str, source: str) -> None:
        """An end token inside would teach the model to stop there, and to go on after stopping."""
        if self._end_id in answer_ids[:-1]:
            end = self.tokenizer.convert_ids_to_tokens(self._end_id)
            raise RowError(
                f"{source}: field {field}: value {answer[:60]!r}: must not hold the "
                f"end-of-turn token {end!r}",
                f"{field}: end-of-turn token inside",
            )

    def _find_system_turn(self) -> bool:
        dialogue = [{"role": "system", "content": _PROBE}, {"role": "user", "content": "x"}]
        try:
            return _PROBE in self._render(dialogue, None, open_answer=True)
        except RowError:
            return False

    def _find_turn_end(self) -> tuple[str, str]:
        """(text behind an answer, its part up to the first special token, "" if it has none)."""
        if self.template.format == "text":
            return self.tokenizer.eos_token, self.tokenizer.eos_token
        dialogue = [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": _PROBE},
        ]
        try:
            text = self._render(self._worded(dialogue), None, open_answer=False)
        except RowError as error:
            raise ConfigError(f"{self._name()}: {error}") from None
        _, found, suffix = text.rpartition(_PROBE)
        if not found:
            raise ConfigError(f"{self._name()}: the chat template does not show an answer's text")
        special = set(self.tokenizer.all_special_tokens)
        special |= {t.content for t in self.tokenizer.added_tokens_decoder.values() if t.special}
        ends = [suffix.find(token) + len(token) for token in special if token and token in suffix]
        return suffix, suffix[: min(ends)] if ends else ""

    # --- checks of the settings ---

    def _name(self) -> str:
        return f"tokenizer {getattr(self.tokenizer, 'name_or_path', '') or 'without a name'}"

    def _check_chat(self) -> None:
        if not self.tokenizer.chat_template:
            raise ConfigError(
                f"{self._name()} has no chat template: set the dataset's template to 'alpaca' or "
                "to a template file with format: text"
            )
        for name in self._kwargs:
            if name in _RESERVED:
                raise ConfigError(
                    f"chat_template_kwargs.{name} is set by FastAlign itself: remove it"
                )

    def _check_text(self) -> None:
        if self._kwargs:
            raise ConfigError(
                f"chat_template_kwargs has {', '.join(self._kwargs)}, but a text template takes "
                "no arguments: remove them or set the dataset's template to chat"
            )
        if self.tokenizer.eos_token is None:
            raise ConfigError(f"{self._name()} has no eos_token: an answer would have no end")
        # A text template writes no BOS itself: the tokenizer's own habit decides.
        frame = self.tokenizer("")["input_ids"]
        bos = self.tokenizer.bos_token_id
        self._bos = [bos] if bos is not None and frame[:1] == [bos] else []


def _asked(system: str, question: str) -> list[Message]:
    turns = [{"role": "system", "content": system}] if system else []
    return [*turns, {"role": "user", "content": question}]


def _transcript(messages: Messages) -> str:
    """The dialogue as text: a single user turn as it stands, else every turn with its role."""
    if len(messages) == 1 and messages[0]["role"] == "user":
        return messages[0]["content"]
    return "\n\n".join(f"{m['role'].capitalize()}: {_spoken(m)}" for m in messages)


def _spoken(message: Mapping[str, Any]) -> str:
    """What a turn says, and what it calls."""
    calls = [json.dumps(call, ensure_ascii=False) for call in message.get("tool_calls") or ()]
    return "\n".join(part for part in (message["content"], *calls) if part)


def fit(prompt_ids: np.ndarray, completion_ids: np.ndarray, max_length: int) -> np.ndarray | str:
    """The completion cut on the right to ``max_length`` tokens of prompt and completion.

    Returns the ids (int32 [C'], C' >= 1), or the reason to drop the row when the prompt leaves no
    room: a completion is never cut to nothing.  One that was sampled empty is a reason as well.
    Streams that must keep equal completions are cut by their longest prompt.
    """
    if not len(completion_ids):
        return NO_ANSWER
    room = max_length - len(prompt_ids)
    return completion_ids[:room] if room > 0 else NO_ROOM


def fit_stream(stream: Stream, max_length: int) -> Stream | str:
    """A dialogue cut on the right, or the reason to drop it when no target would be left."""
    if len(stream) <= max_length:
        return stream
    targets = np.flatnonzero(stream.loss_mask[:max_length])
    if not len(targets):
        return CUT_OFF
    end = int(targets[-1]) + 1
    return Stream(stream.role, stream.input_ids[:end], stream.loss_mask[:end])


# --- template files ----------------------------------------------------------------------------


def load_template(name: str | None) -> Template:
    """A built-in template by name, or one from a YAML file; None is "chat".

    Raises:
        ConfigError: no such name or file, unknown keys, wrong values or placeholders.
    """
    if name is None:
        return TEMPLATES["chat"]
    if name in TEMPLATES:
        return TEMPLATES[name]
    if not os.path.isfile(name):
        raise ConfigError(
            f"template {name!r} is neither a file nor one of {', '.join(map(repr, TEMPLATES))}"
        )
    template = _from_file(name, Template)
    if template.format not in ("chat", "text"):
        raise ConfigError(f"{name}: format = {template.format!r}: want 'chat' or 'text'")
    if template.format == "chat" and (template.response or template.separator):
        raise ConfigError(f"{name}: response and separator belong to format: text")
    return template


def load_judge_template(path: str | None) -> JudgeTemplate:
    """The built-in judge template, or one from a YAML file.

    Raises:
        ConfigError: no such file, unknown keys, wrong values or placeholders; {principle} in both
            or none of its places.
    """
    if path is None:
        return JudgeTemplate()
    values = _values(path, JudgeTemplate)
    if values.keys() & {"prompt", "principle_system"}:
        # The built-in question would not go with the words of the file.
        values.setdefault("principle_prompt", None)
    named = {principle_name(name): text for name, text in values.get("principles", {}).items()}
    template = JudgeTemplate(**values | {"principles": {**PRINCIPLES, **named}})
    places = template.names_principle()
    if len(places) == 2:
        raise ConfigError(
            f"{path}: {{principle}} stands in principle_system and in principle_prompt: want it in "
            "one of them"
        )
    if not places and (values.get("principle_system") or values.get("principle_prompt")):
        raise ConfigError(
            f"{path}: {{principle}} stands in neither principle_system nor principle_prompt: want "
            "it in one of them"
        )
    return template


def load_written_template(path: str | None) -> WrittenTemplate:
    """The built-in template of written judgments, or one from a YAML file.

    Raises:
        ConfigError: no such file, unknown keys, wrong values or placeholders.
    """
    if path is None:
        return WrittenTemplate()
    template = _from_file(path, WrittenTemplate)
    wordless = next((phrase for phrase in template.fine if not _words(phrase)), None)
    if wordless is not None:
        raise ConfigError(f"{path}: fine has {wordless!r}: every reply would begin with it")
    return template


def _from_file(path: str, kind: type[Any]) -> Any:
    return kind(**_values(path, kind))


def _values(path: str, kind: type[Any]) -> dict[str, Any]:
    """The keys and values of a template file, checked."""
    values = read_yaml(path, "template")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for name, value in values.items():
        if name not in fields:
            near = difflib.get_close_matches(str(name), fields, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(fields)}"
            raise ConfigError(f"{path}: {name} is no key of a template: {hint}")
        values[name] = _checked(f"{path}: {name}", value, fields[name])
    for name, wanted in kind.placeholders.items():
        if values.get(name) is not None:
            optional = getattr(kind, "optional", {}).get(name, ())
            _check_placeholders(f"{path}: {name}", values[name], wanted, optional)
    return values


def _checked(name: str, value: Any, key: dataclasses.Field[Any]) -> Any:
    """A value of the kind that a template's key takes."""
    if key.default is dataclasses.MISSING:
        if not isinstance(value, dict) or not all(
            isinstance(text, str) for item in value.items() for text in item
        ):
            raise ConfigError(f"{name} = {short(value)}: want a mapping of names to texts")
        return value
    if isinstance(key.default, tuple):
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise ConfigError(f"{name} = {short(value)}: want a list of texts")
        return tuple(value)
    if not isinstance(value, str) and not (value is None and "None" in str(key.type)):
        raise ConfigError(f"{name} = {short(value)}: want text")
    return value


def _check_placeholders(
    name: str, text: str, wanted: Sequence[str], optional: Sequence[str] = ()
) -> None:
    try:
        parts = list(string.Formatter().parse(text))
    except ValueError as error:
        raise ConfigError(f"{name}: {error} (a brace of the text is written twice)") from None
    found = {field for _, field, _, _ in parts if field is not None}
    plain = all(not spec and conversion is None for _, _, spec, conversion in parts)
    if not plain or not set(wanted) <= found <= {*wanted, *optional}:
        right = " and perhaps ".join(_listed(names) for names in (wanted, optional) if names)
        raise ConfigError(
            f"{name}: has {_listed(sorted(found)) or 'no placeholder'}: want {right} "
            "(a brace of the text is written twice)"
        )


def _listed(names: Iterable[str]) -> str:
    return " and ".join(f"{{{name}}}" for name in names)
