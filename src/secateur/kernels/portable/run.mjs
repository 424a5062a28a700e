// node run.mjs convolutions.wasm vectors|oracle [repeats] < message > answer
//
// With repeats the milliseconds of each come first on the other output, after as many that are not counted: an engine
// compiles a function anew when it has run for a while.
import { readFileSync, writeSync } from "node:fs";

const [file, how, repeats = "0"] = process.argv.slice(2);
const { exports } = new WebAssembly.Instance(new WebAssembly.Module(readFileSync(file)));
const message = readFileSync(0);
const at = exports.reserve(message.length);
new Uint8Array(exports.memory.buffer, at, message.length).set(message);
const call = () => exports.convolve(at, how === "oracle" ? 1 : 0);
call();
const spent = [];
for (let turn = 0; turn < 2 * Number(repeats); turn++) {
  const start = performance.now();
  call();
  spent.push(performance.now() - start);
}
if (spent.length) console.error(spent.slice(spent.length / 2).join(" "));
const answer = new Uint8Array(exports.memory.buffer, at, message.length);
for (let sent = 0; sent < answer.length; ) sent += writeSync(1, answer, sent);
