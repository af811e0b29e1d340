"""The look of the HTML report."""

CSS = """
:root { color-scheme: light dark;
  --page:#f6f7f9; --card:#ffffff; --ink:#1b2129; --faint:#5c6773; --grid:#dfe3e8; --soft:#c9d0d8;
  --accent:#1f5fd0;
  --c0:#8a94a0; --c1:#2563eb; --c2:#d97706; --c3:#0f9d83; --c4:#9b3fd6; --c5:#d13b6b; }
@media screen and (prefers-color-scheme: dark) { :root {
  --page:#12161b; --card:#1a2027; --ink:#e6eaee; --faint:#9aa6b2; --grid:#313a44; --soft:#4a5663;
  --accent:#7fb0ff;
  --c0:#8f9aa6; --c1:#6ea8ff; --c2:#f5a63c; --c3:#3ccbb0; --c4:#c58bf5; --c5:#f27aa0; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.5;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 2rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .7rem; }
h3 { font-size: 1rem; margin: 0 0 .4rem; overflow-wrap: anywhere; }
p { margin: .3rem 0 .8rem; max-width: 46rem; }
.note { color: var(--faint); font-size: .875rem; }
code { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: .85em;
  overflow-wrap: anywhere; }
.card { background: var(--card); border: 1px solid var(--grid); border-radius: 10px; padding: 1rem 1.1rem;
  margin: 0 0 1rem; break-inside: avoid; min-width: 0; }
.key { display: inline-block; width: .7em; height: .7em; border-radius: 2px; margin-right: .45em; }
.entry { display: inline-block; margin-right: .6em; }
.pictures { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 400px), 1fr)); }
.pictures .card { margin: 0; }
.pictures svg { display: block; width: 100%; height: auto; overflow: visible; }
.pictures figcaption { color: var(--faint); font-size: .8125rem; margin-top: .4rem; }
figure { margin: 0; }
.scroll { overflow-x: auto; }
table { border-collapse: separate; border-spacing: 0; width: 100%; font-size: .9rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .7rem; text-align: right; border-bottom: 1px solid var(--grid); vertical-align: top; }
th { font-weight: 600; }
thead th { color: var(--faint); font-size: .8125rem; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
td:last-child, th:last-child { padding-right: 0; }
table.compare td { white-space: nowrap; min-width: 4.4rem; }
table.compare th + th { max-width: 9rem; min-width: 4.4rem; overflow-wrap: anywhere; }
table.compare th:first-child { position: sticky; left: 0; background: var(--card); min-width: 5.5rem; }
table.compare td small { white-space: normal; }
tbody tr:last-child > * { border-bottom: 0; }
tbody th { font-weight: 400; }
tr.strong > * { font-weight: 650; }
td small { display: block; color: var(--faint); font-size: .75rem; font-weight: 400; }
table.short { font-size: 1.25rem; }
table.short thead th, table.short tbody th { font-size: .9rem; }
table.short td small { font-size: .85rem; }
ul { margin: .6rem 0 0; padding-left: 1.1rem; font-size: .9rem; color: var(--faint); }
td.text, th.text { text-align: left; max-width: 22rem; }
code.short { white-space: nowrap; }
p.matrix { margin: .8rem 0 .2rem; }
dl { display: grid; grid-template-columns: 9rem minmax(0, 1fr); gap: .3rem 1rem; margin: 0; font-size: .9rem; }
dt { color: var(--faint); } dd { margin: 0; overflow-wrap: anywhere; }
details { margin-top: .6rem; } summary { cursor: pointer; color: var(--accent); font-size: .9rem; }
pre { overflow-x: auto; font-size: .8rem; margin: .5rem 0 0; white-space: pre-wrap; overflow-wrap: anywhere;
  font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
footer { color: var(--faint); font-size: .8125rem; margin-top: 2.5rem; }
@media (max-width: 640px) {
  main { padding: 1.2rem .8rem 3rem; } h1 { font-size: 1.4rem; } .card { padding: .85rem; }
  th, td { padding: .35rem .4rem; } table { font-size: .82rem; } table.short { font-size: 1rem; }
  table.compare thead th { font-size: .75rem; overflow-wrap: break-word; }
  table.compare thead .key { display: block; margin: 0 0 .25em auto; }
  dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .5rem; }
  table.gates thead { display: none; }
  table.gates tr { display: block; border-bottom: 1px solid var(--grid); padding: .5rem 0; }
  table.gates tr:last-child { border-bottom: 0; }
  table.gates td { display: flex; justify-content: space-between; gap: 1rem; border: 0; padding: .12rem 0;
    text-align: right; max-width: none; }
  table.gates td::before { content: attr(data-label); color: var(--faint); text-align: left; flex: none; }
  table.gates td:first-child { font-weight: 650; }
}
@page { margin: 14mm; }
@media print {
  body { background: #fff; font-size: 9.5pt; line-height: 1.4; } main { max-width: none; padding: 0; }
  h1 { font-size: 16pt; } h2 { font-size: 12pt; margin: 1.2rem 0 .4rem; } h3 { font-size: 10pt; }
  h2, h3, p.matrix, summary, p:has(+ section) { break-after: avoid; } p { break-inside: avoid; }
  .card { border-color: #ccc; padding: .6rem .8rem; margin: 0 0 .6rem; } .card.long { break-inside: auto; }
  .key, svg { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  .pictures { grid-template-columns: 1fr 1fr; gap: .6rem; } .pictures figcaption, .note { font-size: 8pt; }
  table, ul { font-size: 8.5pt; } table.short { font-size: 12pt; }
  th, td { padding: .16rem .5rem; } thead th { font-size: 8pt; }
  tr { break-inside: avoid; } .scroll { overflow: visible; }
  table.compare td small { display: inline; font-size: 7.5pt; padding-left: .5em; }
  table.short td small { display: block; font-size: 8.5pt; padding: 0; }
  table.gates code { font-size: 7.5pt; }
  table.gates td small { display: none; }
  summary { list-style: none; color: var(--faint); font-size: 8.5pt; }
  summary::-webkit-details-marker { display: none; }
  dl { grid-template-columns: 6rem minmax(0, 1fr); gap: .1rem .8rem; font-size: 8.5pt; } pre { font-size: 7.5pt; }
}
"""
