"""What a report's page looks like, and the few lines of script that sort its tables and open in print what is folded;
without them nothing is lost but that. Browsers that know `::details-content` print folded parts without it."""

from __future__ import annotations

GENERATOR = '<meta name="generator" content="solostep report">'
"""By which a page is known as one of ours."""
CSS = """
:root{--ink:#16191d;--muted:#59616b;--line:#d9dde2;--paper:#ffffff;--soft:#f4f6f8;--accent:#0072b2;--good:#00694c;
--good-soft:#e2f4ee;--bad:#9a4100;--bad-soft:#fdeee2;--open:#5c4a00;--open-soft:#fbf3d3;
--font:system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans","Helvetica Neue",Arial,sans-serif;
--mono:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;color-scheme:light dark}
@media (prefers-color-scheme:dark){:root{--ink:#e9ecef;--muted:#a4adb7;--line:#39414a;--paper:#14171a;--soft:#1d2126;
--accent:#7cc4f0;--good:#7fdcbb;--good-soft:#12332a;--bad:#ffb37a;--bad-soft:#3a2413;--open:#ecd67c;
--open-soft:#332d12}
svg.plot{filter:saturate(1.05) brightness(1.12)}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 var(--font);-webkit-text-size-adjust:100%}
main,header,footer{max-width:80rem;margin:0 auto;padding:0 1.25rem}
header{padding-top:2.2rem}
h1{font-size:1.85rem;line-height:1.2;margin:0 0 .4rem;letter-spacing:-.015em}
h2{font-size:1.4rem;line-height:1.25;margin:3rem 0 .6rem;padding-top:1.4rem;border-top:2px solid var(--ink)}
h3{font-size:1.08rem;margin:2.2rem 0 .4rem}
p{margin:.5rem 0;max-width:48rem}
.env,.small,figcaption,.note,caption{color:var(--muted);font-size:.875rem}
a{color:var(--accent)}
nav{display:flex;flex-wrap:wrap;gap:.4rem 1.1rem;margin:1rem 0 0;font-size:.9rem}
.tag{display:inline-block;font-size:.78rem;font-weight:600;padding:.1rem .5rem;border-radius:.3rem;
border:1px solid currentColor;
color:var(--open);background:var(--open-soft);vertical-align:.12em;letter-spacing:.01em}
.claims{display:flex;flex-wrap:wrap;gap:.9rem;margin:1.2rem 0}
.claim{flex:1 1 17rem;border:1px solid var(--line);border-left:5px solid var(--muted);border-radius:.45rem;
padding:.8rem 1rem;background:var(--soft)}
.claim p{max-width:none}
.claim:first-child{border-left-color:var(--accent);flex-basis:100%}
.claim .what{font-size:.82rem;color:var(--muted);margin:0;font-weight:600}
.claim .mode{font-size:1.22rem;font-weight:650;margin:.05rem 0 .2rem;line-height:1.3}
.claim:first-child .mode{font-size:1.55rem}
.claim p:last-child{margin:0;font-size:.94rem}
.note{border-left:3px solid var(--line);padding-left:.7rem}
.warn{border-left:4px solid var(--bad);background:var(--bad-soft);padding:.5rem .8rem;border-radius:.25rem;
font-size:.92rem}
.scroll{overflow-x:auto;margin:.8rem 0 .3rem;border:1px solid var(--line);border-radius:.45rem}
.scroll:focus-visible{outline:2px solid var(--accent)}
table{border-collapse:separate;border-spacing:0;font-size:.86rem;width:100%;font-variant-numeric:tabular-nums}
caption{text-align:left;padding:.5rem .7rem;caption-side:top;font-weight:600;color:var(--ink)}
th,td{padding:.42rem .6rem;text-align:right;vertical-align:top;border-bottom:1px solid var(--line);white-space:nowrap}
td.text,th.text{text-align:left}
td,th{background:var(--paper)}
tr>:first-child{position:sticky;left:0;background:var(--paper);text-align:left;z-index:1;
box-shadow:1px 0 0 var(--line)}
tbody th{font-weight:600}
thead th{background:var(--soft);vertical-align:bottom;white-space:normal;line-height:1.25;font-weight:600}
thead tr>:first-child{background:var(--soft)}
thead tr.over th{border-bottom:0;padding-bottom:0;color:var(--muted);font-weight:500;text-align:left;
border-left:1px solid var(--line)}
thead tr.over th:first-child,thead tr.over th:empty{border-left:0}
tbody tr:last-child>*{border-bottom:0}
td small,th small{display:block;color:var(--muted);font-size:.92em;font-weight:400;line-height:1.25}
tr.reference>*,tr.floor>*{background:var(--soft)}
tr.reference>:first-child,tr.floor>:first-child{font-weight:500;font-style:italic}
tr.last>*{border-bottom:2px solid var(--muted)}
.mark{display:inline-block;border-radius:.25rem;padding:0 .4rem;font-weight:600;white-space:normal;text-align:left}
td.text:nth-child(2){white-space:normal;min-width:11.5rem}
.mark.floor{color:var(--good);background:var(--good-soft)}
.mark.above{color:var(--bad);background:var(--bad-soft)}
.mark.open{color:var(--open);background:var(--open-soft)}
button.sort{font:inherit;color:inherit;background:none;border:0;padding:0;text-align:inherit;cursor:pointer;
text-decoration:underline dotted var(--muted);text-underline-offset:.2em}
th[aria-sort=ascending] button::after{content:" ▲";font-size:.7em}
th[aria-sort=descending] button::after{content:" ▼";font-size:.7em}
figure{margin:1rem 0 1.6rem}
figcaption{max-width:48rem;margin-top:.3rem}
svg.plot{display:block;width:100%;height:auto;max-width:60rem}
svg.plot text{font-family:var(--font)}
.halo text{paint-order:stroke;stroke:var(--paper);stroke-width:3px;stroke-linejoin:round}
svg.narrow{display:none}
details{margin:.6rem 0;border:1px solid var(--line);border-radius:.45rem;padding:0 .9rem}
summary{cursor:pointer;padding:.55rem 0;font-weight:600;font-size:.94rem}
details[open]{padding-bottom:.6rem}
details.plain{border:0;padding:0;margin:0;color:var(--muted);font-size:.875rem}
details.plain summary{font-weight:400;font-size:inherit;padding:.1rem 0}
.pictures{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,26rem),1fr));gap:1.4rem}
.pictures figure{margin:0}
.pictures img{display:block;width:100%;height:auto;margin-bottom:.35rem}
.pixel img{image-rendering:pixelated}
.heads{display:grid;grid-template-columns:repeat(3,1fr);font-size:.78rem;color:var(--muted);gap:4px;
margin-bottom:.2rem}
.heads.two{grid-template-columns:repeat(2,1fr)}
.pictures h4{margin:0 0 .25rem;font-size:.95rem}
pre{overflow-x:auto;background:var(--soft);border:1px solid var(--line);border-radius:.4rem;padding:.6rem .8rem;
font:.82rem/1.5 var(--mono)}
code{font-family:var(--mono);font-size:.9em}
dl{display:grid;grid-template-columns:minmax(7rem,max-content) 1fr;gap:.35rem 1.1rem;font-size:.92rem;max-width:60rem;
margin:.6rem 0}
dt{font-weight:600}
dd{margin:0;overflow-wrap:anywhere}
footer{padding-top:2.5rem;padding-bottom:3rem;color:var(--muted);font-size:.85rem}
@media (max-width:640px){body{font-size:15px}main,header,footer{padding-left:.9rem;padding-right:.9rem}header{
padding-top:1.3rem}
h1{font-size:1.45rem}h2{font-size:1.22rem}.claim:first-child .mode{font-size:1.28rem}
svg.wide{display:none}svg.narrow{display:block}th,td{padding:.4rem .5rem}
tbody tr>:first-child,thead tr>:first-child{max-width:8.6rem;white-space:normal}
dl{grid-template-columns:1fr;gap:0}dd{margin-bottom:.5rem}}
@media print{:root{--ink:#000;--muted:#444;--line:#bbb;--paper:#fff;--soft:#f4f4f4;--good:#00523b;--good-soft:#fff;
--bad:#7a3300;
--bad-soft:#fff;--open:#4a3c00;--open-soft:#fff;--accent:#000;color-scheme:light}svg.plot{filter:none}
@page{size:A4 landscape;margin:12mm}
body{font-size:9.5pt}main,header,footer{max-width:none;padding:0}nav,.loop{display:none}
.scroll{overflow:visible;border:0}table{font-size:6.6pt}th,td{padding:.12rem .22rem}td,tbody th{white-space:normal}
td.text:nth-child(2){min-width:0}
td,th{background:var(--paper)}
tr>:first-child{position:static;box-shadow:none}.mark{border:1px solid currentColor}
section{break-before:page}section:first-of-type{break-before:auto}caption{break-after:avoid}
.scroll:has(.sortable),svg.plot{break-inside:avoid}details::details-content{content-visibility:visible;block-size:auto}
.pictures{grid-template-columns:repeat(4,1fr);gap:.6rem}.pictures h4{font-size:8pt}
.pictures .small,.heads{font-size:6.6pt}
h3,summary{break-after:avoid}
figure,tr,.claim,.pictures figure{break-inside:avoid}svg.wide{display:block;max-width:17cm}svg.narrow{
display:none}
.runs{columns:2;column-gap:6mm}details.run{break-inside:avoid;margin:0 0 2mm;padding:0 1.5mm 1mm;font-size:7pt}
.run summary{padding:1mm 0;font-size:8pt}.run p,.run ul,.run pre{margin:.5mm 0}.run .scroll{margin:0}
.run caption{display:none}.run table{font-size:6.2pt}.run pre{padding:1mm;font-size:6.2pt}.run .small{font-size:6.2pt}
pre{white-space:pre-wrap;overflow-wrap:anywhere}button.sort{text-decoration:none}}
@media (prefers-reduced-motion:no-preference){html{scroll-behavior:smooth}}
"""

SCRIPT = """
document.querySelectorAll('table.sortable').forEach(function(table){
  var heads=table.tHead.rows[table.tHead.rows.length-1].cells,body=table.tBodies[0];
  Array.prototype.forEach.call(heads,function(head,column){
    var button=document.createElement('button');button.type='button';button.className='sort';
    while(head.firstChild)button.appendChild(head.firstChild);
    head.appendChild(button);
    button.addEventListener('click',function(){
      var up=head.getAttribute('aria-sort')!=='ascending';
      Array.prototype.forEach.call(heads,function(h){h.removeAttribute('aria-sort')});
      head.setAttribute('aria-sort',up?'ascending':'descending');
      var rows=Array.prototype.filter.call(body.rows,function(r){return !r.className});
      rows.sort(function(a,b){
        var x=a.cells[column].dataset.value,y=b.cells[column].dataset.value;
        if(x===undefined||y===undefined)return (x===undefined)-(y===undefined)||
          a.cells[column].textContent.localeCompare(b.cells[column].textContent)*(up?1:-1);
        return (x-y)*(up?1:-1)});
      rows.forEach(function(r){body.appendChild(r)});
    });
  });
});
var unfolded=[];
addEventListener('beforeprint',function(){
  if(unfolded.length)return;
  document.querySelectorAll('details:not([open]):not(.loop)').forEach(function(d){d.open=true;unfolded.push(d)});
});
addEventListener('afterprint',function(){
  unfolded.forEach(function(d){d.open=false});unfolded=[];
});
"""
