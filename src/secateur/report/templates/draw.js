for (const data of document.querySelectorAll('script[type="application/json"][data-chart]')) {
  const target = data.previousElementSibling;
  const spec = JSON.parse(data.textContent);
  // As many legend entries side by side as the width has room for.
  const longest = Math.max(0, ...[...data.textContent.matchAll(/"domain":\["([^\]]*)"\]/g)]
    .flatMap(found => found[1].split('","').map(name => name.length)));
  spec.config.legend.columns = Math.max(1, Math.floor((target.clientWidth - 40) / (34 + 7 * longest)));
  vegaEmbed(target, spec, { actions: false, renderer: 'svg', ast: false }).catch(error => {
    target.textContent = 'This chart could not be drawn: ' + error.message;
  });
}
