"""When something was, as people say it in a conversation, put as a date: "last Saturday", said on 25 May 2023, is 20 May 2023."""

from __future__ import annotations

import calendar
import re
from collections.abc import Callable
from datetime import date, datetime, timedelta

DAYS = [name.lower() for name in calendar.day_name]
NUMBERS = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10}
_number = rf"(?P<count>{'|'.join(NUMBERS)}|\d+)"
_in = r"(?:over |in |during )?(?:the )?"
_day = rf"(?P<day>{'|'.join(DAYS)}|(?:mon|tues?|wed|thurs?|fri|sat|sun)\b\.?)"


def session_date(text: str) -> date:
    """`1:56 pm on 8 May, 2023` as a date. ValueError where it is none."""
    return datetime.strptime(text.partition(" on ")[2].strip(), "%d %B, %Y").date()


def written(day: date) -> str:
    """8 May 2023."""
    return f"{day.day} {day:%B %Y}"


def _months(day: date, count: int) -> date:
    month = day.year * 12 + day.month - 1 + count
    return date(month // 12, month % 12 + 1, 1)


def _count(m: re.Match) -> int:
    return NUMBERS.get(m["count"].lower()) or int(m["count"])


def _weekday(said: date, name: str, before: bool) -> date:
    number = next(i for i, day in enumerate(DAYS) if day.startswith(name.lower()[:3]))
    away = (said.weekday() - number) % 7 or 7
    return said - timedelta(away) if before else said + timedelta(7 - away if away != 7 else 7)


# What is said, and what it is: (preposition and date), given the match and the day on which it was said. The longer come first.
_SAYINGS: tuple[tuple[str, Callable[[re.Match, date], str]], ...] = (
    (r"the day before (?:the|this) conversation|yesterday|last night", lambda m, d: f"on {written(d - timedelta(1))}"),
    (r"(?:on )?the day of the conversation|earlier today|today|tonight|this morning", lambda m, d: f"on {written(d)}"),
    (r"the day after (?:the|this) conversation|tomorrow", lambda m, d: f"on {written(d + timedelta(1))}"),
    (rf"(?:on |the )?(?:last|past|previous) {_day}", lambda m, d: f"on {written(_weekday(d, m['day'], True))}"),
    (rf"(?:on |the )?(?:next|this|coming) {_day}", lambda m, d: f"on {written(_weekday(d, m['day'], False))}"),
    (rf"{_number} days? ago", lambda m, d: f"on {written(d - timedelta(_count(m)))}"),
    (rf"{_number} (?P<unit>week(?:end)?s?) ago", lambda m, d: f"{m['count'].lower()} {m['unit'].lower()} before {written(d)}"),
    (rf"{_number} months? ago", lambda m, d: f"in {_months(d, -_count(m)):%B %Y}"),
    (rf"{_number} years? ago", lambda m, d: f"in {d.year - _count(m)}"),
    (rf"{_in}(?:last|past|previous) (?P<unit>week(?:end)?)", lambda m, d: f"the {m['unit'].lower()} before {written(d)}"),
    (r"over the weekend", lambda m, d: f"the weekend before {written(d)}"),
    (rf"{_in}(?:next|coming|following) (?P<unit>week(?:end)?)", lambda m, d: f"the {m['unit'].lower()} after {written(d)}"),
    (r"this (?P<unit>week(?:end)?)", lambda m, d: f"the {m['unit'].lower()} of {written(d)}"),
    (rf"{_in}(?:last|past|previous) month", lambda m, d: f"in {_months(d, -1):%B %Y}"),
    (rf"{_in}(?:next|coming|following) month", lambda m, d: f"in {_months(d, 1):%B %Y}"),
    (r"(?:during |earlier |later )?(?:this month|(?:in )?the month of the conversation)", lambda m, d: f"in {d:%B %Y}"),
    (rf"{_in}(?:last|past|previous) year", lambda m, d: f"in {d.year - 1}"),
    (rf"{_in}next year", lambda m, d: f"in {d.year + 1}"),
    (r"(?:earlier |later )?this year", lambda m, d: f"in {d.year}"),
)
_BEFORE, _AFTER = r"\b(?:(?:for|by|until|since|from|about|around) )*", r"(?![\w'])"
_PATTERNS = tuple((re.compile(f"{_BEFORE}(?:{pattern}){_AFTER}", re.IGNORECASE), put) for pattern, put in _SAYINGS)


def resolved(text: str, said: date) -> tuple[str, str] | None:
    """(the text without its first saying of time, that time as a date with its preposition), or None where it says none.

    said: the day on which it was said.
    """
    found = [(m.start(), -len(m[0]), m, put) for pattern, put in _PATTERNS if (m := pattern.search(text))]
    if not found:
        return None
    _, _, m, put = min(found, key=lambda one: one[:2])
    without = text[: m.start()].rstrip(" ,") + text[m.end() :]
    return re.sub(r"\s+([.,])", r"\1", without).strip(), put(m, said)
