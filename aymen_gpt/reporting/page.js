const short = v => { const a = Math.abs(v);
  for (const [s, l] of [[1e12, 'T'], [1e9, 'B'], [1e6, 'M'], [1e4, 'K']])
    if (a >= s) return +(v / (l === 'K' ? 1e3 : s)).toPrecision(3) + l;
  return a && a < 0.01 ? v.toExponential(2).replace(/\.?0+e/, 'e') : String(+v.toPrecision(4)); };
for (const svg of document.querySelectorAll('svg.chart')) {
  const title = svg.querySelector('title');
  svg.setAttribute('aria-label', title.textContent);
  svg.setAttribute('aria-describedby', svg.querySelector('desc').id);
  svg.removeAttribute('aria-labelledby');
  title.remove();
  const [x0, x1] = svg.dataset.x.split(' ').map(Number), [y0, y1] = svg.dataset.y.split(' ').map(Number);
  const yunit = svg.dataset.unit;
  const log = svg.dataset.log === '1', out = svg.closest('figure').querySelector('output');
  const curves = [...svg.querySelectorAll('path[data-name]')].map(p => ({
    name: p.dataset.name.replace(/^(train, )?each step| of .*|idation$/g, ''),
    at: [...p.getAttribute('d').matchAll(/(-?\d+) (-?\d+)/g)].map(m => [m[1] / 1e4, 1 - m[2] / 1e4]) }));
  const cursor = document.createElementNS(svg.namespaceURI, 'line');
  cursor.setAttribute('class', 'cursor'); cursor.setAttribute('y2', '100%');
  svg.addEventListener('pointermove', event => {
    const box = svg.querySelector('.area').getBoundingClientRect();
    const f = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    const near = curves.filter(c => c.at.length).map(c => [c.name,
      c.at.reduce((a, b) => Math.abs(b[0] - f) < Math.abs(a[0] - f) ? b : a)]);
    for (const end of ['x1', 'x2']) cursor.setAttribute(end, 100 * f + '%');
    svg.append(cursor);
    const value = y => log ? y0 * (y1 / y0) ** y : y0 + y * (y1 - y0);
    const say = y => yunit ? short(100 * value(y)) + ' %' : short(value(y));
    out.textContent = short(x0 + f * (x1 - x0)) + ': ' +
      near.map(([name, p]) => (name && name + ' ') + say(p[1])).join(', ');
  });
  svg.addEventListener('pointerleave', () => { cursor.remove(); out.textContent = ''; });
}
addEventListener('beforeprint', () => document.querySelectorAll('details').forEach(d => { d.open = true; }));
