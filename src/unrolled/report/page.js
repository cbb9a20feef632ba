"use strict";
// Draws the figures in the page's colours, and joins the written sentence with its heat map.
(() => {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const figures = read("data-figures"), settings = read("data-settings");
  const dark = window.matchMedia("(prefers-color-scheme: dark)");

  const colours = () => {
    const style = getComputedStyle(document.documentElement);
    return Object.fromEntries(["card", "ink", "soft", "line"].map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
  };

  const inTheme = (layout) => {
    const { card, ink, soft, line } = colours();
    const themed = {
      ...layout,
      paper_bgcolor: card,
      font: { ...layout.font, color: ink },
      hoverlabel: { ...layout.hoverlabel, bgcolor: card, bordercolor: soft, font: { ...(layout.hoverlabel || {}).font, color: ink } },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: soft, activecolor: ink },
    };
    themed.updatemenus = (layout.updatemenus || []).map((menu) => ({
      ...menu, bgcolor: card, bordercolor: line, font: { color: ink, size: 12 },
    }));
    return themed;
  };

  // What stands in cells takes the page's ink: plotly would choose for a white page.
  const inInk = (data) => data.map((trace) =>
    trace.texttemplate ? { ...trace, textfont: { ...trace.textfont, color: colours().ink } } : trace);

  const png = {
    name: "png", title: "Save as PNG",
    icon: Plotly.Icons ? Plotly.Icons["camera-retro"] : undefined,
    click: (place) => Plotly.downloadImage(place, { format: "png", scale: 2, filename: "unrolled" }),
  };
  const config = { ...settings, modeBarButtonsToAdd: png.icon ? [png] : [] };

  const places = figures.map((figure, i) => {
    const place = document.getElementById(`figure-${i}`);
    Plotly.newPlot(place, inInk(figure.data), inTheme(figure.layout), config);
    return place;
  });
  dark.addEventListener("change", () => {
    places.forEach((place, i) => Plotly.react(place, inInk(figures[i].data), inTheme(figures[i].layout), config));
  });

  const percent = (share) => `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)} %`;

  for (const looking of document.querySelectorAll(".looking")) {
    const weights = JSON.parse(looking.querySelector("script").textContent);
    const sources = [...looking.querySelectorAll(".source .word")];
    const targets = [...looking.querySelectorAll(".target .word")];
    const line = looking.querySelector(".row"), first = line.innerHTML;
    // Its heat map is in a section of its own: attention, or of a second model attention-2.
    const map = document.querySelector(`#${looking.closest("section").id.replace("answer", "attention")} .figure`);
    let now = -1;
    const show = (u) => {
      if (u === now || (u >= 0 && !weights[u])) return;
      now = u;
      targets.forEach((word, i) => word.classList.toggle("here", i === u));
      sources.forEach((word, s) => {
        word.style.backgroundColor = u < 0 ? "" : `rgba(var(--cool), ${(0.75 * weights[u][s]).toFixed(3)})`;
      });
      line.innerHTML = first;
      if (u >= 0) {
        line.textContent = "";
        const strongest = weights[u].map((w, s) => [w, s]).sort((a, b) => b[0] - a[0]).slice(0, 4).filter(([w]) => w >= 0.01);
        const bold = document.createElement("b");
        bold.textContent = targets[u].textContent.trim() || "␣";
        line.append(bold, " looks at " + strongest.map(([w, s]) => `${sources[s].textContent.trim() || "␣"} ${percent(w)}`).join(", "));
      }
      if (map) {
        const shapes = u < 0 ? [] : [{
          type: "rect", xref: "paper", x0: 0, x1: 1, yref: "y", y0: u - 0.5, y1: u + 0.5,
          line: { color: `rgb(${getComputedStyle(document.documentElement).getPropertyValue("--warm")})`, width: 2 },
        }];
        Plotly.relayout(map, { shapes });
      }
    };
    targets.forEach((word, u) => {
      word.addEventListener("mouseenter", () => show(u));
      word.addEventListener("focus", () => show(u));
      word.addEventListener("click", () => show(u));
      word.addEventListener("mouseleave", () => show(-1));
      word.addEventListener("blur", () => show(-1));
    });
    if (map) {
      map.on("plotly_hover", (event) => {
        const point = event.points[0];
        show(Array.isArray(point.pointIndex) ? point.pointIndex[0] : Math.round(point.y));
      });
      map.on("plotly_unhover", () => show(-1));
    }
  }
  document.documentElement.dataset.drawn = String(places.length);
})();
