"""Texts that broke out of somebody's query, page or terminal, for every place that takes one."""

from __future__ import annotations

_SQL = [
    "'", "''", "'''", '"', '""', "`", "``", "\\", "\\\\", "\\'", "\\\\'", "\\''", '\\"', "'\\", "x'", "x\\' OR 1=1 --",
    "' OR '1'='1", "' OR '1'='1' --", "' OR 1=1 --", "\\' OR '1'='1", "\\' OR 1=1 --", "\\\\' OR 1=1 --", '" OR ""="',
    "') OR ('1'='1", "')) OR (('1'='1", "x' OR 1=1 --", "x' OR 1=1 /*", "x' OR 1=1 #",
    "x' OR title IS NOT NULL OR 'x'='",
    "' OR title IS NOT NULL OR '", "'; DROP TABLE products; --", "); DROP TABLE products", "1; DELETE FROM products",
    "' UNION SELECT * FROM rejects --", "' AND price > 0 AND '1'='1", "dress' --", "dress'--", "dress' /* */ OR '1'='1",
    "/*", "*/", "/* */", "--", "-- ", "#", ";", "' ESCAPE '\\", "E'\\x27 OR 1=1'", "U&'\\0027'", "N'x'", "x''y", "$$",
    "$1", "?", ":title", "@title", "X'27'", "x'27' or true", "chr(39)", "concat('a','b')", "cast('1' as int)", "NULL",
    "null", "title", "`title`", "true", "TRUE", "false", "1=1", "1", "0", "-1", "1e9", "NaN", "Infinity", "2026-01-01",
]  # fmt: skip
_PATTERNS = [
    "%",
    "_",
    "%%",
    "%'%",
    "_%_",
    "\\%",
    "\\_",
    "*",
    "?*",
    ".*",
    "[a-z]",
    "^",
    "$",
    "(",
    ")",
    "((",
    "]",
    "{",
    "}",
]
_LANCE = [
    "array_has(tags, 'a')", "arrow_cast('1', 'Int64')", "_rowid", "_distance", "_rowid >= 0", "title = title",
    "title in ('a')", "contains(title, '')", "not", "and", "or", "is null", "between", "eq", "$ne",
    '{"eq": 1}', "(SELECT 1)",
]  # fmt: skip
_FORMATS = [
    "${x}",
    "{0}",
    "{}",
    "%s",
    "%(x)s",
    "{{x}}",
    "<%= 1 %>",
    "{policy}",
    "\\x27",
    "&#39;",
    "&quot;",
    "%27",
    "\\u0027",
]
_UNICODE = [
    "‘", "’", "＇", "ʼ", "′", "´", "＂", "“", "ｄress", "＼", "∕*", "；", "İ", "ß", "ﬀ", "e\u0301", "é", "🧥'",
    "👩‍👩‍👧",
    "\u202eevil\u202c", "\u2066'\u2069", "\u200b'", "\ufeff'", "\u2028' OR 1=1", "\u0085", "\u00a0", "\ufffd", "\uffff",
    "\U0010ffff", "赤いドレス", "żółć", "שמלה",
]  # fmt: skip
_CONTROL = [
    "x\x00y", "\x00", "\x00'", "' OR 1=1\x00", "\n", "\r\n", "\t", "\n' OR 1=1", "\x08'", "\x1a", "\x1b[31m", "\x7f'",
    "\x1b]0;owned\x07", "\x9b31m", " ", "  ", " dress", "dress ", "",
]  # fmt: skip
_LONG = ["x" * 5_000, "'" * 5_001, "\\'" * 2_500, "(" * 3_000, " OR 1=1" * 700, "🧥" * 2_000, "a.b." * 500]

HOSTILE = list(dict.fromkeys(_SQL + _PATTERNS + _LANCE + _FORMATS + _UNICODE + _CONTROL + _LONG))
"""All of them are texts that UTF-8 can hold."""

NO_TEXTS = ["\ud800", "dress\udfff", "\udc27 OR 1=1", "x" * 20_001]
"""Halves of surrogate pairs, and what is too long: refused wherever a text is compared."""
