"""The page's Jinja template; every value in it is escaped."""

from __future__ import annotations

TEMPLATE = """\
{% macro text(part) %}
{% if part.is_known %}
<div class="text" dir="auto">{% for run, differs in part.head %}{% if differs %}<mark>{{ run }}</mark>{% else %}\
{{ run }}{% endif %}{% endfor %}{% if part.left_out %}<span class="cut">{{ part.left_out }} characters not shown</span>\
{{ part.tail }}{% endif %}</div>
{% else %}
<div class="text muted">tokens only</div>
{% endif %}
{% endmacro %}
{% macro plain(part) %}{{ text(dict(part, head=[(part.text, false)])) }}{% endmacro %}
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>Preference pairs</title>
<style>{{ css }}</style>
</head>
<body>
<h1>Preference pairs</h1>
<p class="muted files">{{ files[:4] | join(", ") }}{% if files | length > 4 %} and {{ files | length - 4 }} more\
{% endif %}</p>
{% if tiles and pairs %}
<nav><a href="#numbers">all pairs</a><a href="#lengths">lengths</a>{% if generation %}<a href="#generation">generation\
</a>{% endif %}<a href="#pairs">{% if asked_for is not none %}the pairs of {{ asked_for }}{% else %}\
{{ pairs | length }} to read{% endif %}</a></nav>
{% endif %}
{% if tiles %}
<div class="tiles">
{% for number, name in tiles %}<div class="card"><b class="number">{{ number }}</b><span>{{ name }}</span></div>
{% endfor %}
</div>
{% endif %}

{% if plots %}
<h2 id="numbers">All pairs</h2>
<div class="plots">
{% for plot in plots %}
<div class="card"><h3>{{ plot.title }}</h3><p class="about">{{ plot.about }}</p>{{ plot.svg }}</div>
{% endfor %}
</div>
<h2 id="lengths">Lengths</h2>
<div class="card scroll"><table>
<tr><th></th><th>count</th><th>minimum</th><th>median</th><th>95 % up to</th><th>maximum</th></tr>
{% for name, cells in lengths %}
<tr><td>{{ name }}</td>{% for cell in cells %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
{% if generation %}
<h2 id="generation">Generation</h2>
<div class="tiles generation">
{% for name, number in generation.numbers %}
<div class="card"><b class="number">{{ number }}</b><span>{{ name }}</span></div>
{% endfor %}
</div>
<div class="plots">
{% for dropped in generation.dropped if dropped.rows %}
<div class="card"><h3>{{ dropped.title }}</h3><p class="about">By reason</p>
<div class="reasons">
{% for name, count, percent in dropped.rows %}
<span>{{ name }}</span><i style="width: {{ '%.1f' | format(percent) }}%"></i><span class="number">{{ count }}</span>
{% endfor %}
</div></div>
{% endfor %}
</div>
{% endif %}
{% endif %}

{% if pairs %}
<h2 id="pairs">{% if asked_for is not none %}The pairs of {{ asked_for }}{% else %}{{ pairs | length }} of \
{{ "{:,}".format(num_pairs) }} {{ "pair" if num_pairs == 1 else "pairs" }}{% endif %}</h2>
{% if marks_differences %}
<p class="about before-pairs">Words that stand in one answer alone are <span class="chosen"><mark>marked</mark></span> \
where the answers are alike.</p>
{% endif %}
{% for pair in pairs %}
{% set view = pair.view %}
<article class="card pair" id="pair-{{ loop.index }}">
<header><h3>{{ view.id }}</h3><span class="muted">pair {{ view.turn }} of {{ view.num_turns }}</span>
<span class="muted">{{ pair.document_name }}: {{ view.document.length }}</span>
<span class="muted end">similarity {{ "%.2f" | format(view.similarity) }} · {{ pair.location }}</span></header>
{% if view.note %}<section class="note">{{ view.note }}</section>{% endif %}
{% for role, content in pair.context %}
<section class="context"><div class="name"><b>{{ role }}</b></div>
<div class="text" dir="auto">{{ content }}</div></section>
{% endfor %}
<section>
<div class="name"><b>{{ pair.chunk_name }}</b>{% if pair.chunk %}<span>{{ pair.chunk.length }}</span>\
{% if pair.place %}<span>{{ "%.0f" | format(pair.place[0]) }} to {{ "%.0f" | format(pair.place[1]) }} % of the document\
</span>{% endif %}{% else %}<span>none: the row has no short prompt</span>{% endif %}</div>
{% if pair.place %}
<div class="place" role="img" aria-label="place of the chunk in its document"><i style="left: \
{{ '%.2f' | format(pair.place[0]) }}%; width: {{ '%.2f' | format(pair.place[1] - pair.place[0]) }}%"></i></div>
{% endif %}
{% if pair.chunk and pair.chunk.is_known %}
<details><summary>read it</summary>{{ plain(pair.chunk) }}</details>
{% endif %}
</section>
<section class="instruction">
<div class="name"><b>{{ "Instruction" if view.has_instruction else "End of the prompt" }}</b>\
<span>{{ pair.instruction.length }}</span></div>
{{ plain(pair.instruction) }}
</section>
<div class="answers">
<div class="chosen"><div class="name"><b class="chosen-name">Chosen</b><span>{{ pair.chosen.length }}</span></div>
{{ text(pair.chosen) }}</div>
<div class="rejected">\
<div class="name"><b class="rejected-name">Rejected</b><span>{{ pair.rejected.length }}</span></div>
{{ text(pair.rejected) }}</div>
</div>
</article>
{% endfor %}
{% endif %}
<footer>Chosen: the model's answer when it saw the chunk alone. Rejected: its answer when it saw the whole document. \
Similarity: 2 × common words / all words of both. Made by tools/inspect_pairs.py.</footer>
</body>
</html>
"""
