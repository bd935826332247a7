// GPT-2 in JavaScript: the page of NumPy of chapter 1.14, forward only, with
// the keys and values kept (chapter 4.19), its tokenizer (1.2) and its draws
// (1.19). Nothing here knows of a document: live.js runs it in a worker, and
// tests/test_book_live.py holds it to Python.
function llmnbGpt2() {
  // ---- The weights: live-model.js, as book/_ext/live.py packed it --------

  // Each character is a whole number from -45 to 45.
  function numbers(text, digits) {
    const place = new Int8Array(128);
    for (let i = 0; i < digits.length; i++)
      place[digits.charCodeAt(i)] = i - (digits.length >> 1);
    const out = new Int8Array(text.length);
    for (let i = 0; i < out.length; i++) out[i] = place[text.charCodeAt(i)];
    return out;
  }

  // A row is its scale and then its weights.
  function unpackRows(text, columns, digits) {
    const codes = numbers(text, digits), width = columns + 1;
    const out = new Float32Array((codes.length / width) * columns);
    for (let i = 0, at = 0; i < codes.length; i += width) {
      const scale = 2 ** (codes[i] / 8 - 10);
      for (let k = 1; k < width; k++) out[at++] = scale * codes[i + k];
    }
    return out;
  }

  // Two characters a number, high and low, and one scale for all.
  function unpackFine([scale, text], digits) {
    const codes = numbers(text, digits);
    const out = new Float32Array(codes.length / 2);
    for (let i = 0; i < out.length; i++)
      out[i] = scale * (codes[2 * i] * digits.length + codes[2 * i + 1]);
    return out;
  }

  function unpack(packed) {
    const params = {};
    for (const [name, [columns, text]] of Object.entries(packed.matrices))
      params[name] = unpackRows(text, columns, packed.digits);
    for (const [name, fine] of Object.entries(packed.vectors))
      params[name] = unpackFine(fine, packed.digits);
    return params;
  }

  // ---- The tokenizer: pairs of bytes, merged in order of rank -------------

  const SPACE = "\\p{White_Space}"; // Rust's \s, of which JavaScript's differs
  const WORDS = new RegExp(
    "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+"
      + `| ?[^${SPACE}\\p{L}\\p{N}]+|${SPACE}+(?!\\P{White_Space})|${SPACE}+`,
    "gu");

  function tokenizer(packed) {
    const bytes = Array.from({ length: 256 }, (_, i) => String.fromCharCode(i));
    const tokens = [...bytes, ...packed.tokens]; // one character a byte
    const ranks = new Map(tokens.map((token, rank) => [token, rank]));
    const eot = tokens.length;

    function merge(word) {
      const parts = [...word];
      for (;;) {
        let best = Infinity, at = -1;
        for (let i = 0; i + 1 < parts.length; i++) {
          const rank = ranks.get(parts[i] + parts[i + 1]) ?? Infinity;
          if (rank < best) [best, at] = [rank, i];
        }
        if (at < 0) return parts.map(part => ranks.get(part));
        parts.splice(at, 2, parts[at] + parts[at + 1]);
      }
    }

    const utf8 = new TextEncoder();
    const known = new Map(); // words that came before
    function encodeWord(word) {
      if (!known.has(word)) {
        const raw = [...utf8.encode(word)].map(b => bytes[b]).join("");
        known.set(word, merge(raw));
      }
      return known.get(word);
    }

    const encode = text => (text.match(WORDS) ?? []).flatMap(encodeWord);

    // The text that each token adds: of a character in several tokens, the
    // last one adds it. Bytes that form none become the replacement mark.
    function pieces(ids) {
      const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
      const out = [...ids].map(id => decoder.decode(
        Uint8Array.from(tokens[id] ?? "", c => c.charCodeAt(0)),
        { stream: true }));
      if (out.length) out[out.length - 1] += decoder.decode();
      return out;
    }

    return { encode, pieces, decode: ids => pieces(ids).join(""), eot };
  }

  // ---- The model ----------------------------------------------------------

  // sum of a[i + k] b[j + k]; n is a multiple of four
  function dot(a, i, b, j, n) {
    let p = 0, q = 0, r = 0, s = 0;
    for (let k = 0; k < n; k += 4) {
      p += a[i + k] * b[j + k];
      q += a[i + k + 1] * b[j + k + 1];
      r += a[i + k + 2] * b[j + k + 2];
      s += a[i + k + 3] * b[j + k + 3];
    }
    return p + q + (r + s);
  }

  // out = w x + b, with the w and b of block l
  function linear(out, x, w, b, l) {
    const rows = out.length, columns = x.length;
    for (let o = 0; o < rows; o++)
      out[o] = b[l * rows + o]
        + dot(w, (l * rows + o) * columns, x, 0, columns);
  }

  function layernorm(out, x, w, b, l) {
    const C = x.length;
    let mean = 0, variance = 0;
    for (const v of x) mean += v / C;
    for (const v of x) variance += (v - mean) ** 2 / C;
    const rstd = 1 / Math.sqrt(variance + 1e-5);
    for (let i = 0; i < C; i++)
      out[i] = (x[i] - mean) * rstd * w[l * C + i] + b[l * C + i];
  }

  function gelu(x) {
    const root = Math.sqrt(2 / Math.PI);
    for (let i = 0; i < x.length; i++) {
      const v = x[i];
      x[i] = 0.5 * v * (1 + Math.tanh(root * (v + 0.044715 * v * v * v)));
    }
  }

  // x becomes its softmax, in its first n places
  function softmax(x, n) {
    let top = -Infinity, sum = 0;
    for (let i = 0; i < n; i++) top = Math.max(top, x[i]);
    for (let i = 0; i < n; i++) sum += x[i] = Math.exp(x[i] - top);
    for (let i = 0; i < n; i++) x[i] /= sum;
  }

  function add(x, y) {
    for (let i = 0; i < x.length; i++) x[i] += y[i];
  }

  // A model that reads one token after the other and keeps, for every
  // position, its keys, values, attention weights and logits.
  function model(p, { T, C, L, NH, V }) {
    const size = C / NH, floats = n => new Float32Array(n);
    const keys = floats(L * T * C), values = floats(L * T * C);
    const weights = floats(L * NH * T * T), logits = floats(T * V);
    const x = floats(C), norm = floats(C), y = floats(C), out = floats(C);
    const qkv = floats(3 * C), wide = floats(4 * C);

    // the weights with which position t of block l and head h looks back
    const row = (l, h, t) => {
      const start = ((l * NH + h) * T + t) * T;
      return weights.subarray(start, start + t + 1);
    };
    const logitsAt = t => logits.subarray(t * V, (t + 1) * V);

    function attention(l, t) {
      y.fill(0);
      for (let h = 0; h < NH; h++) {
        const a = row(l, h, t), first = l * T * C + h * size;
        for (let s = 0; s <= t; s++)
          a[s] = dot(qkv, h * size, keys, first + s * C, size)
            / Math.sqrt(size);
        softmax(a, t + 1);
        for (let s = 0; s <= t; s++)
          for (let i = 0; i < size; i++)
            y[h * size + i] += a[s] * values[first + s * C + i];
      }
    }

    function block(l, t) {
      layernorm(norm, x, p.ln1w, p.ln1b, l);
      linear(qkv, norm, p.qkvw, p.qkvb, l);
      keys.set(qkv.subarray(C, 2 * C), (l * T + t) * C);
      values.set(qkv.subarray(2 * C), (l * T + t) * C);
      attention(l, t);
      linear(out, y, p.attprojw, p.attprojb, l);
      add(x, out);
      layernorm(norm, x, p.ln2w, p.ln2b, l);
      linear(wide, norm, p.fcw, p.fcb, l);
      gelu(wide);
      linear(out, wide, p.fcprojw, p.fcprojb, l);
      add(x, out);
    }

    // Read a token at position t, when all before it have been read.
    function step(token, t) {
      for (let i = 0; i < C; i++)
        x[i] = p.wte[token * C + i] + p.wpe[t * C + i];
      for (let l = 0; l < L; l++) block(l, t);
      layernorm(norm, x, p.lnfw, p.lnfb, 0);
      const z = logitsAt(t);
      for (let v = 0; v < V; v++) z[v] = dot(p.wte, v * C, norm, 0, C);
    }

    // How many of these tokens have been read, from the first on; `step`
    // is then owed for the others.
    let read = [];
    function keep(ids) {
      let same = 0;
      while (same < read.length && read[same] === ids[same]) same++;
      read = read.slice(0, same);
      return same;
    }
    function readOne(ids, t) {
      step(ids[t], t);
      read[t] = ids[t];
    }
    function readAll(ids) {
      for (let t = keep(ids); t < ids.length; t++) readOne(ids, t);
    }

    return { keep, readOne, readAll, row, logitsAt, config: { T, C, L, NH, V } };
  }

  // How much a token surprises, in nats: -log p of it under these logits.
  function surprise(z, token) {
    let top = -Infinity, sum = 0;
    for (const v of z) top = Math.max(top, v);
    for (const v of z) sum += Math.exp(v - top);
    return top + Math.log(sum) - z[token];
  }

  // The first of `length` tokens that the model still sees, by chapter 1.19.
  function windowStart(length, T) {
    const half = (T + 1) >> 1;
    return Math.max(0, Math.ceil((length - T) / half) * half);
  }

  // ---- Drawing --------------------------------------------------------------

  // Tokens from the likeliest down; of equals the first.
  function order(z) {
    return Array.from(z.keys()).sort((a, b) => z[b] - z[a] || a - b);
  }

  // The probabilities to draw with. Temperature 0 leaves the likeliest alone.
  function distribution(z, temperature, topK) {
    const probs = new Float64Array(z.length), sorted = order(z);
    const kept = sorted.slice(0, temperature === 0 ? 1 : topK ?? z.length);
    const top = z[sorted[0]];
    let sum = 0;
    for (const i of kept)
      sum += probs[i] = Math.exp((z[i] - top) / (temperature || 1));
    for (const i of kept) probs[i] /= sum;
    return probs;
  }

  // The token on which a number u from [0, 1) falls.
  function draw(probs, u) {
    const total = probs.reduce((a, b) => a + b, 0);
    let border = 0, last = 0;
    for (let i = 0; i < probs.length; i++) {
      border += probs[i];
      if (border > u * total) return i;
      if (probs[i] > 0) last = i;
    }
    return last;
  }

  // NumPy's RandomState(seed).random_sample, the Mersenne Twister, so that a
  // seed draws here what it draws in Python.
  function randomState(seed) {
    const s = new Uint32Array(624);
    s[0] = seed;
    for (let i = 1; i < 624; i++)
      s[i] = Math.imul(1812433253, s[i - 1] ^ (s[i - 1] >>> 30)) + i;
    let at = 624;
    function refill() {
      for (let i = 0; i < 624; i++) {
        const y = (s[i] & 0x80000000) | (s[(i + 1) % 624] & 0x7fffffff);
        s[i] = s[(i + 397) % 624] ^ (y >>> 1) ^ (y & 1 ? 0x9908b0df : 0);
      }
      at = 0;
    }
    function word() {
      if (at === 624) refill();
      let y = s[at++];
      y ^= y >>> 11;
      y ^= (y << 7) & 0x9d2c5680;
      y ^= (y << 15) & 0xefc60000;
      return (y ^ (y >>> 18)) >>> 0;
    }
    return () => ((word() >>> 5) * 67108864 + (word() >>> 6)) / 2 ** 53;
  }

  return {
    unpack, tokenizer, model, surprise, windowStart,
    order, distribution, draw, randomState,
  };
}
