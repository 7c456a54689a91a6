"""The verifiable constraints of IFEval (Zhou et al. 2023, arXiv 2311.07911), in our own words; names and parameters are its own.

Each is a function of the response and of named parameters, which says whether the response meets it. Deviations from IFEval's own
checker: keywords are texts, not regular expressions; a word in capitals is found by our own division into words, not by NLTK's.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping
from functools import cache
from typing import Annotated, Any, Literal, get_type_hints

import langdetect
import punkt
from pydantic import BaseModel, ConfigDict, Field, create_model

Relation = Literal["less than", "at least"]
Count = Annotated[int, Field(ge=0)]
Text = Annotated[str, Field(min_length=1)]
Texts = Annotated[list[Text], Field(min_length=1)]
Check = Callable[..., bool]

CHECKS: dict[str, Check] = {}
"""IFEval's name of a constraint -> what checks it."""

OPTIONS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
"""IFEval's constrained answers, of which the prompt asks for one."""


def constraint(name: str) -> Callable[[Check], Check]:
    """Registers a check under IFEval's name."""

    def register(check: Check) -> Check:
        CHECKS[name] = check
        return check

    return register


@cache
def parameters_of(name: str) -> type[BaseModel]:
    """The parameters of a constraint, as a model that checks them."""
    check = CHECKS[name]
    hints = get_type_hints(check, include_extras=True)
    fields: dict[str, Any] = {
        parameter: (hints[parameter], ...) for parameter in list(inspect.signature(check).parameters)[1:]
    }
    return create_model(name, __config__=ConfigDict(extra="forbid", strict=True), **fields)


def met(name: str, response: str, parameters: Mapping[str, Any]) -> bool:
    """Whether a response that is not blank meets the constraint; a blank one meets none."""
    return bool(response.strip()) and CHECKS[name](response, **parameters)


def _compare(count: int, relation: Relation, threshold: int) -> bool:
    return count < threshold if relation == "less than" else count >= threshold


# Length


@constraint("length_constraints:number_words")
def number_words(response: str, num_words: Count, relation: Relation) -> bool:
    return _compare(len(re.findall(r"\w+", response)), relation, num_words)


@constraint("length_constraints:number_sentences")
def number_sentences(response: str, num_sentences: Count, relation: Relation) -> bool:
    """Sentences as Punkt's English model divides them."""
    return _compare(len(_sentences().tokenize(response)), relation, num_sentences)


@cache
def _sentences() -> punkt.PunktSentenceTokenizer:
    return punkt.PunktSentenceTokenizer(punkt.load_model("english"))


@constraint("length_constraints:number_paragraphs")
def number_paragraphs(response: str, num_paragraphs: Count) -> bool:
    """Paragraphs with `***` between them. The first and the last may be blank and do not count then; any other must not be."""
    parts = _parts(response, "***")
    return parts is not None and len(parts) == num_paragraphs


def _parts(response: str, divider: str) -> list[str] | None:
    """What stands between dividers, but for a blank beginning and end. None if anything else is blank."""
    parts = [part.strip() for part in response.split(divider)]
    kept = [part for place, part in enumerate(parts) if part or 0 < place < len(parts) - 1]
    return kept if all(kept) else None


@constraint("length_constraints:nth_paragraph_first_word")
def nth_paragraph_first_word(response: str, num_paragraphs: Count, nth_paragraph: Count, first_word: Text) -> bool:
    """Paragraphs with a blank line between them, of which the nth (from 1) begins with a word."""
    parts = response.split("\n\n")
    n = sum(bool(part.strip()) for part in parts)
    if n != num_paragraphs or not 1 <= nth_paragraph <= n or not parts[nth_paragraph - 1].strip():
        return False
    word = parts[nth_paragraph - 1].split()[0].lstrip("'").lstrip('"')
    return re.split(r"""[.,?!'"]""", word, maxsplit=1)[0].lower() == first_word.lower()


# Words and letters


@constraint("keywords:existence")
def keywords_exist(response: str, keywords: Texts) -> bool:
    return all(keyword.lower() in response.lower() for keyword in keywords)


@constraint("keywords:forbidden_words")
def no_forbidden_words(response: str, forbidden_words: Texts) -> bool:
    """None of them as a whole word."""
    return not any(re.search(rf"\b{re.escape(word)}\b", response, re.IGNORECASE) for word in forbidden_words)


@constraint("keywords:frequency")
def keyword_frequency(response: str, keyword: Text, frequency: Count, relation: Relation) -> bool:
    return _compare(response.lower().count(keyword.lower()), relation, frequency)


@constraint("keywords:letter_frequency")
def letter_frequency(
    response: str,
    letter: Annotated[str, Field(min_length=1, max_length=1)],
    let_frequency: Count,
    let_relation: Relation,
) -> bool:
    return _compare(response.lower().count(letter.lower()), let_relation, let_frequency)


@constraint("punctuation:no_comma")
def no_comma(response: str) -> bool:
    return "," not in response


# Case and language


@constraint("language:response_language")
def response_language(response: str, language: Text) -> bool:
    """ISO 639-1 code, as langdetect guesses it. A text without letters passes, as in IFEval."""
    langdetect.DetectorFactory.seed = 0  # its guess is random otherwise
    try:
        return langdetect.detect(response) == language
    except langdetect.LangDetectException:
        return True


@constraint("change_case:english_capital")
def english_capital(response: str) -> bool:
    return response.isupper() and response_language(response, "en")


@constraint("change_case:english_lowercase")
def english_lowercase(response: str) -> bool:
    return response.islower() and response_language(response, "en")


@constraint("change_case:capital_word_frequency")
def capital_word_frequency(response: str, capital_frequency: Count, capital_relation: Relation) -> bool:
    """Words all in capitals; one with hyphens in it is one word."""
    words = re.findall(r"[^\W_]+(?:[-_'][^\W_]+)*", response)
    return _compare(sum(word.isupper() for word in words), capital_relation, capital_frequency)


# Beginning and end


@constraint("startend:end_checker")
def ends_with(response: str, end_phrase: Text) -> bool:
    return response.strip().strip('"').lower().endswith(end_phrase.strip().lower())


@constraint("startend:quotation")
def quotation(response: str) -> bool:
    """The whole response in double quotation marks."""
    text = response.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


@constraint("combination:repeat_prompt")
def repeat_prompt(response: str, prompt_to_repeat: Text) -> bool:
    return response.strip().lower().startswith(prompt_to_repeat.strip().lower())


@constraint("combination:two_responses")
def two_responses(response: str) -> bool:
    """Two different answers with `******` between them."""
    answers = _parts(response, "******")
    return answers is not None and len(answers) == 2 and answers[0] != answers[1]


@constraint("detectable_content:postscript")
def postscript(response: str, postscript_marker: Text) -> bool:
    """P.S. and P.P.S may have a blank after each letter's point."""
    patterns = {"P.S.": r"p\.\s?s\.", "P.P.S": r"p\.\s?p\.\s?s"}
    pattern = patterns.get(postscript_marker, re.escape(postscript_marker.lower()))
    return re.search(pattern, response.lower()) is not None


# Form


@constraint("detectable_content:number_placeholders")
def number_placeholders(response: str, num_placeholders: Count) -> bool:
    """At least so many texts in square brackets."""
    return len(re.findall(r"\[.*?\]", response)) >= num_placeholders


@constraint("detectable_format:number_bullet_lists")
def number_bullet_lists(response: str, num_bullets: Count) -> bool:
    """Exactly so many lines that begin with `*` or `-`. A line in bold is none."""
    stars = re.findall(r"^\s*\*[^\*].*$", response, re.MULTILINE)
    dashes = re.findall(r"^\s*-.*$", response, re.MULTILINE)
    return len(stars) + len(dashes) == num_bullets


@constraint("detectable_format:number_highlighted_sections")
def number_highlighted_sections(response: str, num_highlights: Count) -> bool:
    """At least so many texts in *single* or **double** asterisks, within a line."""
    single = [text for text in re.findall(r"\*([^\n\*]*)\*", response) if text.strip()]
    double = [text for text in re.findall(r"\*\*([^\n\*]*)\*\*", response) if text.strip()]
    return len(single) + len(double) >= num_highlights


@constraint("detectable_format:multiple_sections")
def multiple_sections(response: str, section_spliter: Text, num_sections: Count) -> bool:
    """At least so many headings of the form `Section 1`."""
    return len(re.findall(re.escape(section_spliter) + r"\s?\d+", response)) >= num_sections


@constraint("detectable_format:title")
def title(response: str) -> bool:
    """A title in <<double angular brackets>>."""
    return any(text.strip("<> \t") for text in re.findall(r"<<([^\n]+)>>", response))


@constraint("detectable_format:json_format")
def json_format(response: str) -> bool:
    """The whole response is JSON, perhaps in a fenced block."""
    text = re.sub(r"^```(?:json|Json|JSON)?|```$", "", response.strip()).strip()
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


@constraint("detectable_format:constrained_response")
def constrained_response(response: str) -> bool:
    """One of `OPTIONS` is in it."""
    return any(option in response for option in OPTIONS)
