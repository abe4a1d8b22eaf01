"""A model behind an OpenAI-compatible server: questions in, replies out, each paid for once."""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from fastalign import ranks
from fastalign.config import ConfigError, EndpointConfig

Question = Sequence[Mapping[str, Any]]
# So many questions without a reply, one behind the other, and the server is taken to be down.
DOWN = 16


class JudgeError(RuntimeError):
    """A judge that is not ours failed: it cannot be reached, or answers with errors."""


class BudgetSpent(Exception):
    """The next request would go beyond what the recipe allows; the message says what was spent."""


@dataclass(frozen=True)
class Reply:
    """What came of one question: a text, or None and why there is none."""

    text: str | None
    failure: str = ""


@dataclass
class Spent:
    """Sums over the requests of a run."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0

    def add(self, row: Mapping[str, Any]) -> None:
        self.prompt_tokens += row["prompt_tokens"]
        self.completion_tokens += row["completion_tokens"]
        self.cost += row["cost"]


class Endpoint:
    """Asks one model of one server, through the client of the package openai.

    A reply is kept in a file the moment it comes, one JSON line under the hash of everything that
    decided it (server, model, sampling settings, messages), and the same question is answered from
    there, also after a crash.  The limits count what the file has.
    """

    def __init__(self, config: EndpointConfig, key: str, replies: Path) -> None:
        """
        Args:
            key: the recipe's section, for messages.
            replies: the file; made when the first reply comes.

        Raises:
            ConfigError: the client is not installed, or the file holds something else.
        """
        try:
            import openai
        except ImportError:
            raise ConfigError(
                f"{key}.type = 'endpoint' needs the package openai: pip install "
                "'fastalign[endpoint]'"
            ) from None
        self.config = config
        self.spent = Spent()
        self.cached = 0
        self._where = f"{key}.endpoint: {config.base_url}, model {config.model!r}"
        self._key = key
        self._openai = openai
        self._secret = os.environ.get(config.api_key_env, "")
        self._client = openai.OpenAI(
            base_url=config.base_url,
            # Servers of one's own take any key, and the client insists on one.
            api_key=self._secret or "none",
            max_retries=config.max_retries,
            timeout=config.timeout_s,
            http_client=openai.DefaultHttpxClient(event_hooks={"response": [self._limit_body]}),
        )
        self._texts: dict[str, str] = {}
        self._path = replies
        self._file: IO[bytes] | None = None
        self._lock = threading.Lock()
        if ranks.rank() == 0 and replies.is_file():
            self._read()

    def ask(self, questions: Sequence[Question], max_tokens: int) -> list[Reply]:
        """A reply to each question; equal ones are asked once.

        Collective: rank 0 asks for all, so that the limits and the file are those of the run.

        Raises:
            ConfigError: the server refuses the request: its address, model or key is wrong.
            JudgeError: not one question was answered, after all retries, or the server is down.
            BudgetSpent: a limit of the recipe is reached; what was answered until then is kept.
        """
        parts = ranks.gather(list(questions))
        outcome: Any = None
        if ranks.rank() == 0:
            try:
                outcome = self._ask([q for part in parts for q in part], max_tokens)
            except (ConfigError, JudgeError, BudgetSpent) as error:
                outcome = error
        outcome = ranks.from_first(outcome)
        if isinstance(outcome, Exception):
            raise outcome
        before = sum(len(part) for part in parts[: ranks.rank()])
        return outcome[before : before + len(questions)]

    def figures(self) -> dict[str, float]:
        """Sums over the run so far, on rank 0: requests, tokens and cost with those of the file,
        answers that came from the file since this start."""
        figures = {
            "requests": float(self.spent.requests),
            "cached": float(self.cached),
            "prompt_tokens": float(self.spent.prompt_tokens),
            "completion_tokens": float(self.spent.completion_tokens),
        }
        return figures | {"cost": self.spent.cost} if self.config.priced else figures

    def close(self) -> None:
        self._client.close()
        if self._file is not None:
            self._file.close()
            self._file = None

    # --- asking ---

    def _ask(self, questions: Sequence[Question], max_tokens: int) -> list[Reply]:
        hashes = [self._hash(question, max_tokens) for question in questions]
        todo = {h: q for h, q in zip(hashes, questions, strict=True) if h not in self._texts}
        self.cached += len(hashes) - len(todo)
        failures: dict[str, Exception] = {}
        in_a_row, most = 0, max(DOWN, 2 * self.config.max_concurrency)
        pool = ThreadPoolExecutor(self.config.max_concurrency)
        try:
            asked = pool.map(
                lambda name: self._request(name, todo[name], max_tokens),
                todo,
            )
            for name, failure in zip(todo, asked, strict=True):
                if failure is not None:
                    failures[name] = failure
                in_a_row = in_a_row + 1 if self._is_server_s(failure) else 0
                if in_a_row == most:
                    raise JudgeError(
                        f"{self._where}: no reply to {most} questions, one behind the other: "
                        f"{self._line(failures[name])}; the replies so far are in {self._path}"
                    )
        except BudgetSpent:
            # What is under way ends and is paid for before the sum is told.
            pool.shutdown(cancel_futures=True)
            raise BudgetSpent(self._limit_reached()) from None
        finally:
            pool.shutdown(cancel_futures=True)
        replies = [self._reply(name, failures) for name in hashes]
        # One that never answered is set up wrongly; later failures are the caller's to count.
        if replies and not self._texts:
            refused = [isinstance(e, self._openai.BadRequestError) for e in failures.values()]
            if refused and all(refused):
                raise ConfigError(f"{self._where} refuses: {replies[0].failure}")
            raise JudgeError(
                f"{self._where}: no reply to any of {len(replies)} questions: {replies[0].failure}"
            )
        return replies

    def _request(self, name: str, question: Question, max_tokens: int) -> Exception | None:
        """Ask, and keep what is answered; returns why there is nothing to keep."""
        self._reserve()
        try:
            reply = self._client.chat.completions.create(
                model=self.config.model,
                messages=list(question),
                extra_body=self._settings(max_tokens),
            )
        except (
            self._openai.AuthenticationError,
            self._openai.PermissionDeniedError,
            self._openai.NotFoundError,
        ) as error:
            raise ConfigError(f"{self._where} refuses: {self._line(error)}") from None
        except (self._openai.OpenAIError, ValueError) as error:
            # The client lets the error of a body that is not JSON through.
            return error
        try:
            text = reply.choices[0].message.content
        except (AttributeError, IndexError, TypeError):
            return JudgeError("the reply is no chat completion")
        usage = getattr(reply, "usage", None)
        self._keep(
            name,
            # Nothing at all is an answer too, and paid for; asked again it would be the same.
            text if isinstance(text, str) else "",
            getattr(usage, "prompt_tokens", None) or 0,
            getattr(usage, "completion_tokens", None) or 0,
        )
        return None

    def _is_server_s(self, failure: Exception | None) -> bool:
        """Whether a failure says something of the server, and not of the question alone."""
        if isinstance(failure, self._openai.APIStatusError):
            status: int = failure.status_code
            return status >= 500 or status == 429
        return failure is not None

    def _limit_body(self, response: Any) -> None:
        """The client's own limit is of one silence, which a server that says a byte now and then
        never reaches."""
        # httpx or httpx2, by the version of openai.
        http: Any = sys.modules[type(response).__module__.partition(".")[0]]
        limit, body = self.config.timeout_s, response.stream

        class Limited(http.SyncByteStream):
            def __iter__(self) -> Iterator[bytes]:
                deadline = time.monotonic() + limit
                for chunk in body:
                    if time.monotonic() > deadline:
                        raise http.ReadTimeout("the reply does not end", request=response.request)
                    yield chunk

            def close(self) -> None:
                body.close()

        response.stream = Limited()

    def _settings(self, max_tokens: int) -> dict[str, Any]:
        """The fields of a request beside model and messages."""
        ours = {"temperature": self.config.temperature, "max_tokens": max_tokens}
        settings = ours | self.config.extra_body
        return {name: value for name, value in settings.items() if value is not None}

    def _reserve(self) -> None:
        with self._lock:
            if self._limit_reached() is not None:
                raise BudgetSpent
            self.spent.requests += 1

    def _limit_reached(self) -> str | None:
        """Which limit, and what was spent."""
        config, spent = self.config, self.spent
        if config.max_requests is not None and spent.requests >= config.max_requests:
            limit = f"max_requests = {config.max_requests}"
        elif config.max_cost is not None and spent.cost >= config.max_cost:
            limit = f"max_cost = {config.max_cost:g}"
        else:
            return None
        cost = f", cost {spent.cost:.6g}" if config.priced else ""
        return (
            f"{self._key}.endpoint.{limit} is reached: {spent.requests} requests, "
            f"{spent.prompt_tokens} prompt tokens, {spent.completion_tokens} completion "
            f"tokens{cost}"
        )

    def _reply(self, name: str, failures: Mapping[str, Exception]) -> Reply:
        if name in failures:
            return Reply(None, self._line(failures[name]))
        text = self._texts[name]
        return Reply(text) if text.strip() else Reply(None, "the reply is empty")

    def _line(self, error: Exception) -> str:
        """An error of the server's in one line that is not too long, without the key, which some
        servers repeat."""
        text = " ".join(str(error).split())
        if self._secret:
            text = text.replace(self._secret, "***")
        return text if len(text) <= 300 else text[:300] + "..."

    # --- the file ---

    def _hash(self, question: Question, max_tokens: int) -> str:
        config = self.config
        decides = [config.base_url, config.model, self._settings(max_tokens), list(question)]
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()

    def _keep(self, name: str, text: str, prompt_tokens: int, completion_tokens: int) -> None:
        config = self.config
        cost = prompt_tokens * (config.input_cost_per_million or 0.0)
        cost += completion_tokens * (config.output_cost_per_million or 0.0)
        row = {
            "hash": name,
            "text": text,
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "cost": cost / 1e6,
        }
        with self._lock:
            if self._file is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self._path.open("ab")
            self._file.write(json.dumps(row).encode() + b"\n")
            # What a process that is killed had been told is in the file.
            self._file.flush()
            self._texts[name] = text
            self.spent.add(row)

    def _read(self) -> None:
        data = self._path.read_bytes()
        # A crash may have left half a line, which the next one must not follow.
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.truncate(self._path, whole)
        for number, line in enumerate(data[:whole].splitlines(), 1):
            try:
                row = json.loads(line)
                paid = [float(row[name]) for name in ("prompt_tokens", "completion_tokens", "cost")]
                if not all(0 <= number < math.inf for number in paid):
                    raise ValueError
                self._texts[row["hash"]] = str(row["text"])
                self.spent.add(row)
            except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
                raise ConfigError(
                    f"{self._path}:{number}: not a reply as FastAlign keeps them: remove the line"
                ) from None
            self.spent.requests += 1
