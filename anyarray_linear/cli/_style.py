"""The style sheet of the report: light or dark as the reader's system is, and readable on a phone."""

from __future__ import annotations

from ._charts import COLOURS, GRID, PAPER, TEXT

_LIGHT = {"ink": "#1b1f24", "raised": "#f5f6f8", "link": "#0757a8", "bad": "#b3261e", "hit": "#1a7f5a", "miss": "#d1392b"}
_DARK = {
    "paper": "#14171b", "raised": "#1d2127", "ink": "#e6e9ed", "soft": "#a0a9b4", "rule": "#343b44", "link": "#7db8f5",
    "bad": "#ff8a80", "hit": "#3fbf8f", "miss": "#ff6f61",
    "c0": "#6cb0ff", "c1": "#ffa15c", "c2": "#5fd3a6", "c3": "#cf9bf2", "c4": "#e3c04f", "c5": "#ff8fb8",
}  # fmt: skip
_DRAWN = {"paper": PAPER, "soft": TEXT, "rule": GRID, **{f"c{i}": colour for i, colour in enumerate(COLOURS)}}


def _variables(colours: dict[str, str]) -> str:
    return ":root{" + ";".join(f"--{name}:{value}" for name, value in colours.items()) + "}"


STYLE = f"""{_variables(_LIGHT | _DRAWN)}
@media(prefers-color-scheme:dark){{{_variables(_DARK)}}}""" + """
*{box-sizing:border-box}
html{scroll-behavior:smooth;scroll-padding-top:3.5rem}
@media(prefers-reduced-motion:reduce){html{scroll-behavior:auto}}
body{margin:0 auto;max-width:72rem;padding:0 1rem 2rem;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
h1{font-size:1.5rem;margin:1.2rem 0 .4rem;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:2rem 0 .6rem;padding-top:.8rem;border-top:1px solid var(--rule)}
h3{font-size:1rem;margin:1.2rem 0 .4rem}
section:first-child h2{border:0;margin-top:.4rem}
p{max-width:44rem}
a{color:var(--link)}
:focus-visible{outline:2px solid var(--link);outline-offset:2px}
.skip{position:absolute;left:-99rem}.skip:focus{left:1rem;top:.5rem;background:var(--paper);padding:.3rem .6rem;z-index:2}
nav{display:flex;gap:.2rem 1rem;flex-wrap:wrap;padding:.3rem 0}
nav a{padding:.2rem 0}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(8.5rem,1fr));gap:.6rem;margin:0 0 1rem}
.tiles div{background:var(--raised);border-radius:.5rem;padding:.6rem .8rem}
.tiles dt{color:var(--soft);font-size:.85rem}.tiles dd{margin:0;font-size:1.4rem;font-weight:600}
.facts div{display:grid;grid-template-columns:7rem 1fr;gap:.5rem;padding:.25rem 0}
.facts dt{color:var(--soft)}.facts dd{margin:0;overflow-wrap:anywhere}
@media(max-width:30rem){.facts div{grid-template-columns:1fr;gap:0}}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,20rem),1fr));gap:1.2rem}
.pair{display:flex;flex-wrap:wrap;gap:1.2rem 3rem}.pair>*{flex:1 1 20rem;min-width:0;max-width:26rem}
figure{margin:0}figcaption{font-weight:600;margin-bottom:.3rem}
figure svg{display:block;width:100%;height:auto;max-width:34rem}
figure text{font-family:inherit}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:.1rem 1rem;margin:.3rem 0 0;padding:0;font-size:.85rem}
.legend li{display:flex;align-items:center;gap:.4rem}.legend svg{width:1.4rem;height:.5rem}
.note{color:var(--soft);font-size:.85rem;margin:.3rem 0 0}
.wide{overflow-x:auto;max-width:100%;background:linear-gradient(90deg,var(--paper) 40%,transparent) 0/2.5rem 100%,
linear-gradient(270deg,var(--paper) 40%,transparent) 100%/2.5rem 100%,
linear-gradient(90deg,var(--rule),transparent) 0/.8rem 100%,linear-gradient(270deg,var(--rule),transparent) 100%/.8rem 100%;
background-repeat:no-repeat;
background-attachment:local,local,scroll,scroll}
.hint{display:none}@media(max-width:48rem){.hint{display:block}}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:.25rem .7rem;text-align:right;border-bottom:1px solid var(--rule);white-space:nowrap}
th:first-child,td:first-child{text-align:left}
thead th{color:var(--soft);font-weight:500}
.matrix th,.matrix td{padding:.2rem;text-align:center;border:1px solid var(--paper);min-width:1.9rem;height:1.9rem}
.matrix th{font-weight:600;color:var(--ink);white-space:normal;min-width:2.2rem;max-width:7rem;overflow-wrap:anywhere}
.matrix td{background:color-mix(in srgb,var(--hue) var(--share),var(--raised))}
.hit{--hue:var(--hit)}.miss{--hue:var(--miss)}
.images{list-style:none;display:grid;grid-template-columns:repeat(auto-fill,minmax(6.7rem,1fr));gap:.8rem;padding:0}
.images svg{display:block;width:100%;max-width:7rem;background:var(--raised);border-radius:.4rem;fill:var(--ink);
margin-bottom:.3rem}
.images span{white-space:nowrap;font-size:.9rem}
.images small{display:block;color:var(--soft)}
.bar{background:linear-gradient(var(--c0),var(--c0)) 100% 100%/var(--share) 2px no-repeat}
.bad{color:var(--bad);font-weight:600}
code{white-space:nowrap}
pre{background:var(--raised);padding:.7rem;border-radius:.5rem;overflow-x:auto;font-size:.85rem}
details{margin:1rem 0}summary{cursor:pointer;color:var(--link);padding:.2rem 0}
footer{margin-top:2.5rem;color:var(--soft);font-size:.85rem}
@media print{nav,.skip{display:none}}
"""
