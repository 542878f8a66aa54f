// Read refengine's vectors in JavaScript: compute scans and routers, and compare logits of models.
//
//     refengine vectors write VECTORS
//     node tools/vectors/consumer.mjs VECTORS OUTPUTS      Node 18 or newer; no package
//
// Writes what it computes (float64) to OUTPUTS, for `refengine vectors check VECTORS --outputs OUTPUTS --dtype f64`.
// Logits that another program wrote are compared where OUTPUTS holds model/NAME.safetensors.
import { existsSync, mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";

// A safetensors file: 8 bytes with the length of a JSON header, the header, the data.
function load(path) {
  const file = readFileSync(path);
  const start = 8 + Number(file.readBigUInt64LE(0));
  const header = JSON.parse(file.toString("utf8", 8, start));
  delete header.__metadata__;
  const tensors = {};
  for (const [name, { dtype, shape, data_offsets }] of Object.entries(header)) {
    tensors[name] = { shape, data: numbers(file, dtype, start + data_offsets[0], start + data_offsets[1]) };
  }
  return tensors;
}

function numbers(file, dtype, from, to) {
  const size = { F64: 8, I64: 8, F32: 4, BF16: 2 }[dtype];
  if (!size) throw new Error(`the dtype ${dtype} is not read here`);
  const out = new Float64Array((to - from) / size);
  const word = new DataView(new ArrayBuffer(4));
  for (let i = 0, at = from; at < to; i++, at += size) {
    if (dtype === "F64") out[i] = file.readDoubleLE(at);
    else if (dtype === "I64") out[i] = Number(file.readBigInt64LE(at));
    else if (dtype === "F32") out[i] = file.readFloatLE(at);
    else { // a bfloat16 is the upper half of a float32
      word.setUint32(0, file.readUInt16LE(at) << 16);
      out[i] = word.getFloat32(0);
    }
  }
  return out;
}

function save(path, tensors) {
  const header = {};
  let end = 0;
  for (const [name, { shape, data }] of Object.entries(tensors)) {
    header[name] = { dtype: "F64", shape, data_offsets: [end, (end += 8 * data.length)] };
  }
  let text = JSON.stringify(header);
  text += " ".repeat((8 - (Buffer.byteLength(text) % 8)) % 8);
  const length = Buffer.alloc(8);
  length.writeBigUInt64LE(BigInt(Buffer.byteLength(text)));
  const data = Object.values(tensors).map((t) => Buffer.from(t.data.buffer, t.data.byteOffset, t.data.byteLength));
  mkdirSync(dirname(path), { recursive: true });
  writeFileSync(path, Buffer.concat([length, Buffer.from(text), ...data]));
}

// S[t] = exp(dt A) S[t-1] + dt x[t] B[t]',   y[t] = S[t] C[t] + D x[t];   dt = softplus(dt + dt_bias)
function scan(t, constants) {
  const w = (key) => t[`backbone.layers.0.mixer.${key}`].data;
  const [x, dtRaw, B, C] = ["x", "dt", "B", "C"].map((key) => t[`in.${key}`].data);
  const [b, l, h, p] = t["in.x"].shape;
  const [g, n] = t["in.B"].shape.slice(2);
  const [low, high] = constants.dt_limit; // null: no bound
  const S = Float64Array.from(t["in.S"].data);
  const y = new Float64Array(x.length);
  for (let i = 0; i < b; i++) {
    const length = t["in.lengths"] ? t["in.lengths"].data[i] : l; // padding does not touch S
    for (let at = 0; at < length; at++) {
      for (let head = 0; head < h; head++) {
        const A = -Math.exp(w("A_log")[head]);
        let dt = dtRaw[(i * l + at) * h + head] + w("dt_bias")[head];
        dt = dt > 30 ? dt : Math.log1p(Math.exp(dt));
        dt = Math.min(Math.max(dt, low), high ?? Infinity);
        const group = ((i * l + at) * g + Math.floor(head / (h / g))) * n;
        for (let r = 0; r < p; r++) {
          const here = ((i * l + at) * h + head) * p + r;
          const row = ((i * h + head) * p + r) * n;
          let sum = w("D")[head] * x[here];
          for (let k = 0; k < n; k++) {
            S[row + k] = Math.exp(dt * A) * S[row + k] + dt * x[here] * B[group + k];
            sum += S[row + k] * C[group + k];
          }
          y[here] = sum;
        }
      }
    }
  }
  return { y: { shape: t["in.x"].shape, data: y }, S: { shape: t["in.S"].shape, data: S } };
}

// The k largest, of equal ones the lower index first: a stable sort.
const largest = (values, k) => [...values.keys()].sort((i, j) => values[j] - values[i]).slice(0, k);

// s = sigmoid(h gate');  the k best of s + bias are chosen, weighted by s over the sum of the chosen, times a scale
function route(t, config) {
  const gate = t["backbone.layers.0.mixer.gate.weight"].data;
  const bias = t["backbone.layers.0.mixer.gate.e_score_correction_bias"].data;
  const [b, l, d] = t["in.h"].shape;
  const [E, groups] = [config.n_routed_experts, config.n_group];
  const out = new Float64Array(b * l * E);
  for (let at = 0; at < b * l; at++) {
    const h = t["in.h"].data.subarray(at * d, (at + 1) * d);
    const s = Array.from({ length: E }, (_, e) => 1 / (1 + Math.exp(-h.reduce((sum, v, i) => sum + v * gate[e * d + i], 0))));
    let c = s.map((score, e) => score + bias[e]);
    if (groups > 1) { // a group is as good as the sum of its two best
      const size = E / groups;
      const best = Array.from({ length: groups }, (_, i) => {
        const two = c.slice(i * size, (i + 1) * size).sort((u, v) => v - u);
        return two[0] + two[1];
      });
      const kept = largest(best, config.topk_group);
      c = c.map((score, e) => (kept.includes(Math.floor(e / size)) ? score : -Infinity));
    }
    const chosen = largest(c, config.num_experts_per_tok);
    const sum = config.norm_topk_prob ? chosen.reduce((total, e) => total + s[e], 0) + 1e-20 : 1;
    for (const e of chosen) out[at * E + e] = (s[e] / sum) * config.routed_scaling_factor;
  }
  return { weights: { shape: [b, l, E], data: out } };
}

// The largest error over max(1, the largest right value); beyond a row's length nothing counts.
function error(mine, right, lengths) {
  const per = right.data.length / (right.shape[0] * right.shape[1]);
  const scale = Math.max(1, ...right.data.map(Math.abs));
  let worst = 0;
  for (let i = 0; i < right.data.length; i++) {
    const [row, at] = [Math.floor(i / per / right.shape[1]), Math.floor(i / per) % right.shape[1]];
    if (lengths && at >= lengths[row]) continue;
    const off = Math.abs(mine.data[i] - right.data[i]) / scale;
    if (!(off <= worst)) worst = off; // NaN stays
  }
  return worst;
}

const [vectors, outputs] = process.argv.slice(2);
if (!outputs) {
  console.error("usage: node consumer.mjs VECTORS OUTPUTS");
  process.exit(2);
}
let wrong = 0;
for (const entry of JSON.parse(readFileSync(join(vectors, "manifest.json"), "utf8")).cases) {
  const path = join(outputs, entry.file);
  let mine, dtype = "float64";
  if (entry.operation === "ssd_scan") mine = scan(load(join(vectors, entry.file)), entry.constants);
  else if (entry.operation === "route") mine = route(load(join(vectors, entry.file)), entry.config);
  else if (entry.operation === "model" && existsSync(path)) [mine, dtype] = [{ logits: load(path).logits }, "float32"];
  else continue;
  const right = load(join(vectors, entry.file));
  for (const [name, tensor] of Object.entries(mine)) {
    const { expected, valid, tolerance } = entry.outputs[name];
    const off = error(tensor, right[expected], valid && right[valid].data);
    const pass = off <= tolerance[dtype];
    wrong += !pass;
    console.log(`${pass ? "pass" : "FAIL"}  ${entry.name} ${name}: ${off.toExponential(1)} of ${tolerance[dtype]} in ${dtype}`);
  }
  if (entry.operation !== "model") save(path, mine);
}
process.exit(wrong ? 1 : 0);
