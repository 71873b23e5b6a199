"""The words for a subject: its token and its class, as the config or its prompts tell them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from dbtrain.config.inputs import Prepare
from dbtrain.config.subjects import Subject
from dbtrain.runtime.errors import ConfigError

LEARNABLE = re.compile(r"[^\s/.\\\0]+")  # a word with embeddings names a file, and an entry in others


@dataclass(frozen=True)
class SubjectWords:
    token: str  # "sks"
    kind: str  # "dog"
    class_prompt: str  # "a photo of a dog"

    def names(self, prompt: str) -> bool:
        """Whether a prompt is about the subject: it contains `{}` or the token."""
        return "{}" in prompt or self._without(prompt) != prompt.strip()

    def _without(self, prompt: str) -> str:
        return re.sub(rf"(?<!\w){re.escape(self.token)}(?!\w)\s*", "", prompt).strip()

    def put(self, prompt: str) -> tuple[str, str]:
        """(prompt to generate, the same without the token) for a prompt that contains `{}` or the token.

        Raises ConfigError if it contains neither.
        """
        if "{}" in prompt:
            return prompt.replace("{}", f"{self.token} {self.kind}"), prompt.replace("{}", self.kind)
        if not self.names(prompt):
            raise ConfigError(
                f"evaluation.prompts: '{prompt}' is not about the subject; put {{}} or "
                f"'{self.token} {self.kind}' into it"
            )
        return prompt, self._without(prompt)


def of(prepare: Prepare | None, subject: Subject) -> SubjectWords:
    """The subject of a config, from `subject` or else from the instance and class prompts.

    The token is the words that only the instance prompt has; the class follows the token. Raises ConfigError
    with the setting to add if the prompts do not tell.
    """
    if prepare is None:
        raise ConfigError("evaluate needs the photos: the config has no prepare section")
    instance, of_class = prepare.instance_prompt.split(), (prepare.class_prompt or "").split()
    token = (subject.token or _token(prepare, instance, of_class)).split()
    starts = [k for k in range(len(instance)) if instance[k : k + len(token)] == token]
    if not starts:
        raise ConfigError(
            f"subject.token is '{' '.join(token)}', which is not in prepare.instance_prompt "
            f"('{prepare.instance_prompt}')"
        )
    after = instance[starts[0] + len(token) :]
    kind = subject.class_word or " ".join(_shared(after, of_class) if of_class else after)
    if not kind:
        raise ConfigError(
            f"cannot find the class of '{' '.join(token)}' in prepare.instance_prompt "
            f"('{prepare.instance_prompt}'); set subject.class_word, e.g. to dog"
        )
    return SubjectWords(" ".join(token), kind, prepare.class_prompt or f"a photo of {with_article(kind)}")


def with_article(words: str) -> str:
    return f"{'an' if words[0].lower() in 'aeiou' else 'a'} {words}"


def _token(prepare: Prepare, instance: Sequence[str], of_class: Sequence[str]) -> str:
    """The words that only the instance prompt has. Raises ConfigError if there are none, or not in a row."""
    known = {word.lower() for word in of_class}
    own = [k for k, word in enumerate(instance) if word.lower() not in known]
    if not of_class or not own or own[-1] - own[0] >= len(own):
        raise ConfigError(
            f"cannot find the word that names the subject in prepare.instance_prompt "
            f"('{prepare.instance_prompt}') and prepare.class_prompt ('{prepare.class_prompt or ''}'); "
            "set subject.token, e.g. to sks"
        )
    return " ".join(instance[own[0] : own[-1] + 1])


def _shared(after: Sequence[str], of_class: Sequence[str]) -> Sequence[str]:
    """The longest prefix of `after` that is also in the class prompt."""
    for length in range(len(after), 0, -1):
        if any(of_class[k : k + length] == after[:length] for k in range(len(of_class))):
            return after[:length]
    return ()


def check_learned(words: Sequence[str], prepare: Prepare | None) -> None:
    """Raise ValueError unless embeddings can be learned for these words, the tokens of the subjects."""
    prompt = prepare.instance_prompt if prepare and not prepare.captions and len(words) == 1 else None
    for word in words:
        problem = ""
        if not word:
            problem = "is not set; set it, e.g. to sks"
        elif not LEARNABLE.fullmatch(word):
            problem = f"is '{word}'; use one word without '.' and '/'"
        elif prompt is not None and word not in prompt:
            problem = f"is '{word}', which is not in prepare.instance_prompt; put {{token}} into it"
        if problem:
            raise ValueError(f"adapter.token learns the word in subject.token, which {problem}")
