// node group_cols.mjs plan.json: what benchmarks/group_cols.py --node asks for, on one thread.
//
// The plan names the compiled portable kernels, the messages of some cells, and a graph of the same dense layer with the
// folder that onnxruntime-web was installed in. All take turns, round by round, after as many rounds that are not counted:
// an engine compiles a function anew when it has run for a while. Prints the median milliseconds of each as JSON: of the
// processor's time for this process, which what else runs does not lengthen.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const plan = JSON.parse(readFileSync(process.argv[2]));
const compiled = new WebAssembly.Module(readFileSync(plan.program));
const calls = {};
for (const [cell, path] of Object.entries(plan.messages)) {
  const { exports } = new WebAssembly.Instance(compiled);
  const message = readFileSync(path);
  const at = exports.reserve(message.length);
  new Uint8Array(exports.memory.buffer, at, message.length).set(message);
  calls[cell] = () => exports.convolve(at, 0);
}
for (const [cell, graph] of Object.entries(plan.graphs)) {
  const found = createRequire(`${plan.web}/package.json`).resolve("onnxruntime-web");
  const ort = await import(pathToFileURL(found.replace(/\.js$/, ".mjs")));
  ort.env.wasm.numThreads = 1;
  const session = await ort.InferenceSession.create(graph.path, { executionProviders: ["wasm"] });
  const x = new ort.Tensor("float32", new Float32Array(readFileSync(graph.input).buffer.slice(0)), graph.shape);
  calls[cell] = async () => await session.run({ x });
  const wanted = new Float32Array(readFileSync(graph.outcome).buffer.slice(0));
  const got = (await session.run({ x })).y.data;
  const off = wanted.reduce((most, value, i) => Math.max(most, Math.abs(value - got[i])), 0);
  if (!(off < 1e-2)) throw new Error(`${cell} is off by ${off}`);
}

const clock = () => {
  const { user, system } = process.cpuUsage();
  return (user + system) / 1000;
};
const spent = Object.fromEntries(Object.keys(calls).map((cell) => [cell, []]));
const repeats = {};
for (const [cell, call] of Object.entries(calls)) {
  await call();
  const start = clock();
  await call();
  repeats[cell] = Math.max(1, Math.min(50, Math.round(8 / (clock() - start))));
}
for (let round = 0; round < 2 * plan.rounds; round++)
  for (const [cell, call] of Object.entries(calls)) {
    const start = clock();
    for (let turn = 0; turn < repeats[cell]; turn++) await call();
    if (round >= plan.rounds) spent[cell].push((clock() - start) / repeats[cell]);
  }
const median = (times) => times.sort((a, b) => a - b)[times.length >> 1];
console.log(JSON.stringify(Object.fromEntries(Object.entries(spent).map(([cell, times]) => [cell, median(times)]))));
