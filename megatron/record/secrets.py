"""Keep secrets out of what is written down: by the names of variables, and by the look of values."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

WITHHELD = "(withheld)"
# Words of a name: WANDB_API_KEY and HF_TOKEN have them, TOKENIZERS_PARALLELISM has not.
SECRET_WORDS = frozenset(
    {
        *("key", "apikey", "token", "secret", "secrets", "private", "license", "licence", "signature", "cookie"),
        *("pass", "passwd", "password", "passphrase", "pwd", "pat", "auth", "authorization", "bearer"),
        *("credential", "credentials", "cred", "creds", "webhook", "dsn"),
    }
)
# The shapes of well-known keys, of addresses with a password, and of private keys.
KNOWN_SECRET = re.compile(
    # but not a file in Slovak: data/sk-wikipedia_text_document, sk_wikipedia_2024_text_document
    r"(?<!/)\b(?:sk|pk|rk)-[A-Za-z0-9_-]{16,}|\b[spr]k_(?:(?:live|test)_[A-Za-z0-9]{16,}|[0-9a-f]{32,}\b)"
    r"|\bgh[opsru]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}|\bglpat-[\w-]{16,}"
    r"|\bhf_[A-Za-z0-9]{20,}|\bnpm_[A-Za-z0-9]{20,}|\bpypi-[\w-]{20,}"
    r"|\bxox[a-z]-[\w-]{10,}|https://hooks\.slack\.com/\S+|https://discord(?:app)?\.com/api/webhooks/\S+"
    r"|\bA(?:KIA|SIA)[0-9A-Z]{16}\b|\bAIza[\w-]{30,}|\bya29\.[\w-]{20,}"
    r"|\beyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]*"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----(?:.*?-----END [A-Z ]*PRIVATE KEY-----)?"
    r"|(?<=://)[^\s/:@]*:[^\s/@]+(?=@)|(?<=://)[^\s/:@]{16,}(?=@)"
    r"|(?<=\bBearer )[\w.~+/=-]{8,}|(?<=Authorization: Basic )[\w+/=]{8,}|/bot\d+:[\w-]{20,}",
    re.DOTALL,
)
# Within a value: `name=value` of an address or of flags for another program, and the user of curl.
IN_VALUE = re.compile(r"""((?<![\w.])([A-Za-z_][\w-]*)=)([^\s,;&"'|)]+)""")
CURL_USER = re.compile(r"""((?:^|\s)(?:-u|--user)[ =]*["']?)([^\s:"']+:[^\s"']+)""")
# In code: a name, also in quotation marks and brackets, that a text is assigned to.
IN_CODE = re.compile(r"""([A-Za-z_]\w*)["'\])]*\s*[:=]\s*["']([^"'\n]+)["']""")
# A value that is nothing but a long word of mixed letters and digits, as most keys are; paths have slashes and dots.
RANDOM_WORD = re.compile(r"(?=[^\d]*\d)(?=[^a-zA-Z]*[a-zA-Z])[A-Za-z0-9+=_-]{24,}")
# `name: value` and `name=value`, in YAML and its comments, in overrides, and as --name=value; and in a group in braces.
ASSIGNMENT = re.compile(
    r"""^([ \t]*(?:#[ \t]*)?(?:-[ \t]+|--?)?["']?([A-Za-z_][\w.-]*)["']?[ \t]*[:=][ \t]*)(\S.*?)[ \t]*$""", re.MULTILINE
)
IN_BRACES = re.compile(r"""([{,]\s*["']?([A-Za-z_][\w.-]*)["']?\s*:\s*)([^\s,{}][^\n,}]*)""")
# Values that are no secret whatever their name.
PLAIN_VALUE = re.compile(r"""null|~|""|''|true|false|\[\]|[-+.\d]+(?:[eE][-+]?\d+)?""")
# Names of settings that have such a word, and hold none.
PLAIN_NAMES = frozenset({"end_of_document_token", "stop_token_ids", "alert_webhook"})


def is_secret_name(name: str) -> bool:
    """Whether a variable or key of this name usually holds a secret."""
    words = re.split(r"[^a-z0-9]+", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower())
    return name not in PLAIN_NAMES and not SECRET_WORDS.isdisjoint(words)


def has_secret(text: str) -> bool:
    """Whether something in the text looks like a key, a token or a password."""
    return KNOWN_SECRET.search(text) is not None or any(
        is_secret_name(match[1]) and (RANDOM_WORD.fullmatch(match[2]) or "passw" in match[1].lower())
        for match in IN_CODE.finditer(text)
    )


def without_secrets(text: str) -> str:
    """The text, with what looks like a secret replaced, also the values of settings with such a name."""
    found = _value_without_secrets(text)
    return IN_BRACES.sub(_withheld_if_secret, ASSIGNMENT.sub(_withheld_if_secret, found))


def _value_without_secrets(value: str) -> str:
    found = IN_VALUE.sub(_withheld_if_secret, CURL_USER.sub(rf"\g<1>{WITHHELD}", value))
    return KNOWN_SECRET.sub(WITHHELD, found)


def _withheld_if_secret(assignment: re.Match[str]) -> str:
    """assignment: of a beginning with the name, the name, and the value; replaced if the name is a secret's."""
    is_secret = is_secret_name(assignment[2].rpartition(".")[2]) and not PLAIN_VALUE.fullmatch(assignment[3])
    return assignment[1] + WITHHELD if is_secret else assignment[0]


def values_without_secrets(value: Any, name: str = "") -> Any:
    """Plain data as JSON has them, with texts replaced that look like a secret or whose key names one."""
    if isinstance(value, Mapping):
        return {key: values_without_secrets(inner, str(key)) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [values_without_secrets(inner, name) for inner in value]
    if not isinstance(value, str):
        return value
    return WITHHELD if value and is_secret_name(name) else _value_without_secrets(value)


def words_without_secrets(words: Iterable[str]) -> list[str]:
    """The words of a command line, also the ones that follow a flag such as `--api-key`."""
    clean: list[str] = []
    follows_secret = False
    for word in words:
        clean.append(WITHHELD if follows_secret and not word.startswith("-") else without_secrets(word))
        follows_secret = word.startswith("-") and "=" not in word and is_secret_name(word)
    return clean


def environment_without_secrets(environment: Mapping[str, str], prefixes: tuple[str, ...]) -> dict[str, str]:
    """The variables whose names begin with one of `prefixes`, without every one that may be a secret."""
    return {
        name: value
        for name, value in sorted(environment.items())
        if name.startswith(prefixes)
        and not is_secret_name(name)
        and not has_secret(value)
        and not RANDOM_WORD.fullmatch(value)
    }
