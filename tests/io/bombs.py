"""YAML that is small on disk and would be a billion words long if written out."""

#: Keys ``a`` to ``i``, each nine times the one before.
ALIASES = "a: &a word\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
