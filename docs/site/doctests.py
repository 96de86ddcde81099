"""Examples of docstrings are code on the site, wherever in the text they stand."""

import re

import griffe

EXAMPLE = re.compile(r"^( *)(?:# .*\n\1)?>>> .*(?:\n\1\S.*)*", re.MULTILINE)


class Doctests(griffe.Extension):
    def on_object(self, *, obj, **more):
        if obj.docstring:
            obj.docstring.value = EXAMPLE.sub(r"\1```pycon\n\g<0>\n\1```", obj.docstring.value)
