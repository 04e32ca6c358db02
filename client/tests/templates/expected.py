"""Writes expected.json: what Jinja2, set up as transformers sets it up, makes of the templates here.

Run with jinja2 3.1 installed: python expected.py
"""
import datetime
import json
import pathlib

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

HERE = pathlib.Path(__file__).parent
NOW = datetime.datetime(2024, 2, 29, 12, 34, 56)
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
SYSTEM = {"role": "system", "content": " Be <brief> & \"kind\". "}
CHATS = {
    "one": [{"role": "user", "content": "Hello, wörld "}],
    "system": [SYSTEM, {"role": "user", "content": "Hi"}],
    "turns": [
        {"role": "user", "content": "First\n"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\n A1 "},
        {"role": "user", "content": "Second"},
        {"role": "assistant", "content": "A2"},
        {"role": "user", "content": "Third {{ 7*7 }}"},
    ],
    "answered": [SYSTEM, {"role": "user", "content": "Q"}, {"role": "assistant", "content": "<think>t</think>A"}],
    "disorder": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
}


class Generation(Extension):
    """transformers' AssistantTracker, as far as it prints."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller):
        return caller()


def fail(message):
    raise jinja2.exceptions.TemplateError(message)


def main():
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    env.filters["tojson"] = lambda x, indent=None: json.dumps(x, ensure_ascii=False, indent=indent)
    env.globals["raise_exception"] = fail
    env.globals["strftime_now"] = NOW.strftime
    out = {}
    for path in sorted(HERE.glob("*.jinja")):
        template = env.from_string(path.read_text())
        for name, chat in CHATS.items():
            for answer in (True, False):
                for extra in ({}, {"enable_thinking": False}):
                    try:
                        variables = {**TOKENS, **extra, "tools": None, "documents": None}
                        text = {"text": template.render(messages=chat, add_generation_prompt=answer, **variables)}
                    except jinja2.exceptions.TemplateError as e:
                        text = {"error": str(e)}
                    case = {"template": path.stem, "messages": chat, "answer": answer, "variables": extra, **text}
                    out[f"{path.stem} {name} {answer} {len(extra)}"] = case
    (HERE / "expected.json").write_text(json.dumps(list(out.values()), ensure_ascii=False, indent=1) + "\n")


if __name__ == "__main__":
    main()
