"""The page's style sheet: one column, two schemes, no font or picture from elsewhere."""

from __future__ import annotations

CSS = """
:root {
  color-scheme: light dark;
  --page: #f6f6f4; --card: #ffffff; --ink: #1d1f21; --muted: #63676c; --line: #e3e3df; --grid: #ececea;
  --chosen: #0069a8; --rejected: #a85400; --bar: #5b7f95; --accent: #8a3d78;
  --chosen-mark: #d8ebf7; --rejected-mark: #fae5cd; --track: #ebebe7;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #15171a; --card: #1d2024; --ink: #e4e5e7; --muted: #9aa0a8; --line: #2f3339; --grid: #2a2e33;
    --chosen: #5cb8f0; --rejected: #f0a64a; --bar: #7d9fb5; --accent: #d391c4;
    --chosen-mark: #173a52; --rejected-mark: #4a3313; --track: #2a2e33;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0 auto; max-width: 1180px; padding: 36px 24px 64px; background: var(--page); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
h1 { font-size: 26px; line-height: 1.2; margin: 0 0 4px; letter-spacing: -0.01em; }
h2 { font-size: 18px; margin: 40px 0 14px; }
h3 { font-size: 14px; margin: 0; font-weight: 650; }
p { margin: 0; }
.muted, .about { color: var(--muted); }
.about { font-size: 12.5px; line-height: 1.4; margin: 1px 0 8px; }
.files { overflow-wrap: anywhere; }
nav { display: flex; flex-wrap: wrap; gap: 2px 18px; margin-top: 10px; font-size: 13.5px; overflow-wrap: anywhere; }
a { color: var(--chosen); text-underline-offset: 3px; text-decoration-thickness: 1px; }
.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
.plots .card { display: flex; flex-direction: column; } .plots svg { margin-top: auto; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 16px 18px; min-width: 0; }

.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 22px 0 0; }
.tiles .card { padding: 12px 16px; }
.tiles b { display: block; font-size: 23px; line-height: 1.25; font-weight: 600; }
.tiles .number { white-space: normal; }
.tiles span { display: block; line-height: 1.4; font-size: 12.5px; color: var(--muted); }

.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); gap: 12px; }
svg { display: block; width: 100%; height: auto; }
svg text { font: 11px system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; fill: var(--muted); }
svg .grid { stroke: var(--grid); } svg .axis { stroke: var(--line); }
svg .bar { fill: var(--bar); } svg .accent { fill: var(--accent); }
svg .chosen { fill: var(--chosen); fill-opacity: .22; stroke: var(--chosen); stroke-width: 1.6; }
svg .rejected { fill: var(--rejected); fill-opacity: .22; stroke: var(--rejected); stroke-width: 1.6; }
.chosen-name { color: var(--chosen); font-weight: 650; } .rejected-name { color: var(--rejected); font-weight: 650; }

.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; }
th, td { padding: 6px 0 6px 18px; text-align: right; border-top: 1px solid var(--line); white-space: nowrap;
  font-variant-numeric: tabular-nums; }
th { font-weight: 500; color: var(--muted); font-size: 12.5px; border-top: 0; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }

.generation { margin: 0 0 12px; } .generation b { font-size: 19px; }
.before-pairs { margin-bottom: 14px; }
.reasons { display: grid; grid-template-columns: max-content 1fr max-content; gap: 5px 12px; font-size: 13px;
  align-items: center; }
.reasons i { display: block; height: 9px; border-radius: 2px; background: var(--bar); min-width: 2px; }

.pair { padding: 0; margin: 0 0 22px; overflow: hidden; }
.pair header { display: flex; flex-wrap: wrap; gap: 2px 14px; align-items: baseline; padding: 14px 18px 12px;
  border-bottom: 1px solid var(--line); }
.pair h3 { font-size: 15px; overflow-wrap: anywhere; }
.pair header .muted { font-size: 12.5px; overflow-wrap: anywhere; }
.pair header .end { margin-left: auto; }
.pair section { padding: 12px 18px; border-bottom: 1px solid var(--line); }
.name { font-size: 12px; color: var(--muted); display: flex; flex-wrap: wrap; gap: 0 12px; align-items: baseline; }
.name b { color: var(--ink); font-weight: 650; font-size: 13px; }
.place { position: relative; height: 10px; border-radius: 5px; background: var(--track); margin: 9px 0 6px;
  overflow: hidden; }
.place i { position: absolute; top: 0; bottom: 0; min-width: 4px; border-radius: 3px; background: var(--accent); }
.text { white-space: pre-wrap; overflow-wrap: anywhere; margin-top: 6px; }
.instruction .text { font-size: 16px; }
.context { font-size: 13.5px; color: var(--muted); }
details summary { cursor: pointer; color: var(--muted); font-size: 13px; padding-top: 2px; }
details .text { font-size: 13.5px; max-height: 420px; overflow-y: auto; border-left: 3px solid var(--line);
  padding-left: 14px; }
.answers { display: grid; grid-template-columns: 1fr 1fr; }
.answers > div { padding: 12px 18px 18px; min-width: 0; border-top: 3px solid var(--chosen); }
.answers > div + div { border-top-color: var(--rejected); border-left: 1px solid var(--line); }
.answers .text { font-size: 14.5px; max-height: 640px; overflow-y: auto; }
mark { color: inherit; border-radius: 2px; } .chosen mark { background: var(--chosen-mark); }
.rejected mark { background: var(--rejected-mark); }
.cut { display: block; margin: 10px 0; padding: 4px 0; text-align: center; font-size: 12px; color: var(--muted);
  border-top: 1px dashed var(--line); border-bottom: 1px dashed var(--line); }
.note { font-size: 13px; color: var(--rejected); }
footer { margin-top: 40px; font-size: 12.5px; color: var(--muted); }

@media (max-width: 640px) {
  body { padding: 22px 14px 48px; }
  .tiles { grid-template-columns: 1fr 1fr; }
  .answers { grid-template-columns: 1fr; }
  .scroll { padding: 10px 12px; } th, td { padding-left: 6px; } table, th { font-size: 11.5px; }
  th, td:first-child { white-space: normal; vertical-align: bottom; }
  .answers > div + div { border-left: 0; }
  .pair header .end { margin-left: 0; }
}
@media print { details .text, .answers .text { max-height: none; } .pair { break-inside: avoid; } }
"""
