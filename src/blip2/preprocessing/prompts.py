"""Every prompt the project gives to a language model or to an instruction-aware Q-Former.

The paper's: "a photo of" for captions, "Question: {} Answer:" for OPT, "Question: {} Short answer:" for FlanT5, and
"Question: q1 Answer: a1. Question: q2 Answer:" for dialogue. A model folder may name others (`prompts` in blip2.json).
"""

from collections.abc import Sequence

CAPTION_PROMPT = "A picture of"
CAPTION_INSTRUCTION = "Describe the picture."
QUESTION_PROMPT = "Question: {} Answer:"


def question_prompt(question: str, template: str = QUESTION_PROMPT) -> str:
    """The prompt that asks `question`. Braces in the question are plain characters."""
    return template.replace("{}", question.strip())


def dialogue(history: Sequence[tuple[str, str]], question: str, template: str = QUESTION_PROMPT) -> str:
    """The prompt that asks `question` after the turns of `history`, pairs of question and answer, oldest first.

    >>> dialogue([("what is this?", "a cup")], "which colour?")
    'Question: what is this? Answer: a cup. Question: which colour? Answer:'
    """
    turns = [f"{question_prompt(asked, template)} {answered.strip().rstrip('.')}." for asked, answered in history]
    return " ".join([*turns, question_prompt(question, template)])
