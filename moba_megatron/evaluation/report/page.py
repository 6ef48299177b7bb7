"""The HTML of a report: one template, everything inside the page."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, StrictUndefined

MARK = "<!-- a report of moba-megatron -->"

_TEMPLATE = (
    f"<!DOCTYPE html>\n{MARK}\n"
    + """<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title>
<style>
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1150px; margin: 2em auto; padding: 0 1em; color: #222; }
h1, h2 { font-weight: 600; } h2 { margin-top: 2em; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; margin: .6em 0; } td, th { padding: .2em .9em .2em 0; text-align: left; }
th { font-weight: 600; } td { border-top: 1px solid #eee; vertical-align: top; } img { max-width: 100%; }
pre { background: #f6f6f6; padding: 1em; overflow-x: auto; } .quiet { color: #777; }
</style></head><body>
{% macro side_by_side(rows, heads) %}<table>
{% if heads | length > 1 %}<tr><th></th>{% for head in heads %}<th>{{ head }}</th>{% endfor %}</tr>{% endif %}
{% for key, values in rows %}<tr><td>{{ key }}</td>{% for value in values %}<td>{{ value }}</td>{% endfor %}</tr>
{% endfor %}</table>{% endmacro %}
<h1>{{ title }}</h1>
<p class="quiet">made {{ made }} by moba-megatron {{ version }}</p>
{{ side_by_side(numbers, names) }}
{% if differences %}<h2>What differs in the configurations</h2>{{ side_by_side(differences, names) }}{% endif %}
<h2>Training</h2>
{% if curves %}<img src="{{ curves }}" alt="losses, learning rate, gradient norm and speed over the tokens">
{% else %}<p>No step has been taken yet.</p>{% endif %}
<h2>Loss by position</h2>
{% if positions %}<img src="{{ positions }}" alt="loss by position">
{% else %}<p>No evaluation yet: <code>moba-megatron evaluate RUN</code>.</p>{% endif %}
{% if experts %}<h2>Experts</h2>
{% for name, picture in experts %}<h3>{{ name }}</h3><img src="{{ picture }}" alt="load of the experts of {{ name }}">
{% endfor %}{% endif %}
<h2>Routing</h2>
{% for part in routing %}<h3>{{ part.name }}, step {{ part.step }}{{ part.sizes }}</h3>
{% for line in part.advice %}<p>{{ line }}</p>{% endfor %}
<table><tr>{% for key, _ in part.numbers %}<th>{{ key }}</th>{% endfor %}</tr>
<tr>{% for _, value in part.numbers %}<td>{{ value }}</td>{% endfor %}</tr></table>
{% for picture in part.pictures %}<img src="{{ picture }}" alt="routing of one layer">{% endfor %}
{% else %}<p>No routing report yet: <code>moba-megatron evaluate RUN --routing</code>.</p>{% endfor %}
<h2>Tasks</h2>
{% for part in evaluations %}<h3>{{ part.title }}</h3>
{% set heads = part.attentions %}<table><tr><th></th>{% for head in heads %}<th>{{ head }}</th>{% endfor %}</tr>
{% for key, values in part.rows %}<tr><td>{{ key }}</td>{% for value in values %}<td>{{ value }}</td>{% endfor %}</tr>
{% endfor %}</table>
{% for picture in part.pictures %}<img src="{{ picture }}" alt="{{ part.title }}">{% endfor %}
{% else %}<p>No tasks yet: <code>moba-megatron evaluate RUN --tasks all</code>.</p>{% endfor %}
<h2>Throughput</h2>
{% if throughput %}{{ side_by_side(throughput, names) }}{% else %}<p>No step has been taken yet.</p>{% endif %}
{% for name, rows in layouts %}<h3>Changes of the layout of {{ name }}</h3>
<table>{% for when, what in rows %}<tr><td>{{ when }}</td><td>{{ what }}</td></tr>{% endfor %}</table>{% endfor %}
<h2>Environment</h2>
{% if environment %}{{ side_by_side(environment, names) }}{% else %}<p>Not recorded.</p>{% endif %}
<h2>Configuration</h2>
{% for name, text in configs %}<details{% if loop.length == 1 %} open{% endif %}><summary>{{ name }}</summary>
<pre>{{ text }}</pre></details>{% endfor %}
</body></html>
"""
)


def render_page(**parts: Any) -> str:
    """The page. Every part that the template names must be given; text in them is escaped."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.from_string(_TEMPLATE).render(**parts)
