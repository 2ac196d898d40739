"""A model that `meristem export edge` wrote, read with NumPy alone: what the C core computes, said plainly.

    python runtime.py "My sister Lydia likes soup."                       # goes on with a text
    python runtime.py --session chat.safetensors --save next.safetensors "What does Lydia like?"

It needs NumPy and no thread, and is slow: a token takes milliseconds. All is computed in float64. Raises ValueError,
with a sentence, for a file that is none of ours, damaged, or of another model.
"""

import argparse
import hashlib
import json
import sys
import unicodedata
from pathlib import Path

import numpy as np

ATTENTION, GATE, LAYER, MEMORY = range(4)
GATED, NORMALISED, PROJECTED, SIGMOID, ADDITIVE = range(5)
SCHEMA, SESSION = "meristem.edge/1", "meristem.session"
TYPES = {"F32": "<f4", "I64": "<i8", "U8": "u1", "BF16": "<u2"}
ZEROS = b"0" * 64
KINDS = {"head": ("head_bod",), "last_mlp": ("up_bfd", "out_bdf")}  # what may learn beside the memory, and its changes
SCALARS = ("rate_b", "balance_b", "saved_b", "mean_nats_b", "steps_b")
UNIFORM, MARGIN_NATS, MOST_DROPS = 1e-3, 0.5, 8  # of the guard, as meristem.models.weights has them


def tensors_of(content: bytes) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Named tensors and what the header says beside them, after the hash of the whole file was checked."""
    n = int.from_bytes(content[:8], "little")
    if len(content) < 8 or n > len(content) - 8:
        raise ValueError("the file is cut off, of the other byte order, or none of ours.")
    header = json.loads(content[8 : 8 + n])
    said = header.pop("__metadata__", {})
    digest = said.get("sha256", "").encode()
    field = b'"sha256":"'
    if hashlib.sha256(content.replace(field + digest, field + ZEROS, 1)).hexdigest().encode() != digest:
        raise ValueError("the bytes of the file do not have the hash written in it. Take a whole copy.")
    data = content[8 + n :]
    found = {}
    for name, each in header.items():
        first, end = each["data_offsets"]
        if each["dtype"] not in TYPES:
            raise ValueError(f"the tensor '{name}' is of type {each['dtype']}, which no file of ours has.")
        found[name] = np.frombuffer(data[first:end], TYPES[each["dtype"]]).reshape(each["shape"])
        if each["dtype"] == "BF16":
            found[name] = (found[name].astype("<u4") << 16).view("<f4")
    return found, said


def packed(tensors: dict[str, np.ndarray], said: dict[str, str]) -> bytes:
    """The bytes of such a file: integers as such, a change that was learned as bfloat16, all else as float32."""
    header: dict[str, object] = {"__metadata__": {**said, "sha256": ZEROS.decode()}}
    data = b""
    for name, tensor in tensors.items():
        kind = "I64" if tensor.dtype == np.int64 else "BF16" if ".delta." in name else "F32"
        numbers = np.ascontiguousarray(bits_of(tensor) if kind == "BF16" else tensor, TYPES[kind]).tobytes()
        header[name] = {"dtype": kind, "shape": tensor.shape, "data_offsets": [len(data), len(data) + len(numbers)]}
        data += numbers
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    content = len(text).to_bytes(8, "little") + text + data
    return content.replace(ZEROS, hashlib.sha256(content).hexdigest().encode(), 1)


def bits_of(x):
    """Of the nearest bfloat16."""
    bits = np.ascontiguousarray(x, "<f4").view("<u4")
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2")


def kept(x):
    """A change as it is kept: in bfloat16."""
    return (bits_of(x).astype("<u4") << 16).view("<f4").astype(np.float64)


def softmax(x):
    share = np.exp(x - x.max(-1, keepdims=True))
    return share / share.sum(-1, keepdims=True)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def log_sigmoid(x):
    return np.minimum(x, 0) - np.log1p(np.exp(-np.abs(x)))


def excess(x):
    """max(x, 0), smooth at 0."""
    return np.where(x * 64 > 40, x, np.log1p(np.exp(np.minimum(x * 64, 40))) / 64)


def rms(x, gain, eps):
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + eps) * gain


def unit(x):
    return x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-12)


def erf(x):
    """By its series; 60 terms are enough where it is not 1."""
    x = np.clip(x, -6, 6)
    term, total = x, x
    for n in range(1, 200):
        term = term * 2 * x * x / (2 * n + 1)
        total = total + term
    return 2 / np.sqrt(np.pi) * np.exp(-x * x) * total


class Model:
    """Weights, and one reader. logits: the prediction of the next token; None before anything was read."""

    def __init__(self, path):
        tensors, said = tensors_of(Path(path).read_bytes())
        if said.get("schema") != SCHEMA:
            raise ValueError(f"{path} is of version {said.get('schema')!r}, and this runtime reads {SCHEMA!r}.")
        self.said = json.loads(said["model"])
        self.layers = self.said["layers"]
        ends = tensors.pop("piece_ends").tolist()
        content = tensors.pop("pieces").tobytes()
        self.pieces = [content[first:end] for first, end in zip([0, *ends[:-1]], ends, strict=True)]
        self.weights = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
        self.learning, self.is_chosen = None, False
        self.forget()

    def learn(self, which=None, *, lr=None, chunk=64, grad_clip=1.0):
        """Before anything is read: what learns beside the memory, "head" or "last_mlp"; None for nothing.

        lr: None for the rate that was found for the model. A session that is loaded has to learn the same from then on;
        without a call it learns what it did where it was saved.
        """
        if self.n_tokens:
            raise ValueError("weights learn from the first token on, and some were read. Forget the session first.")
        if which is not None and not (which in KINDS and chunk >= 2 and grad_clip > 0 and (lr is None or lr >= 0)):
            raise ValueError(f"{which!r} does not learn here, or its rate, chunk or clip is out of range.")
        how = {"which": which, "lr": lr, "chunk": chunk, "grad_clip": grad_clip}
        self.learning, self.is_chosen = None if which is None else how, True
        self.forget()

    def forget(self):
        """Begin afresh, without what was learned."""
        self.state, self.logits, self.n_tokens, self.header = [], None, 0, {}
        self.learned = None
        if self.learning is not None:
            rest = dict.fromkeys(SCALARS, 0.0) | {"rate_b": self._first_rate(self.learning)}
            delta = {name: np.zeros(w.shape) for name, w in self._still(self.learning).items()}
            self.learned = {"n_chunks": 0, "hidden": [], "tokens": [], "delta": delta, **rest}
        for index, layer in enumerate(self.layers):
            self.state.append({name: self._begin(index, name, shape) for name, shape in self._leaves(layer, 0)})

    def _leaves(self, layer, n_held):
        """The names and shapes of what one layer carries, as a session file has them."""
        d, both = self.said["width"], layer["mixer"] in (GATE, LAYER)
        if layer["mixer"] != MEMORY:
            a = layer["attention_heads"]
            for leaf in ("keys_bshk", "values_bshv"):
                yield ("attention." if both else "") + leaf, (1, min(n_held, layer["span"] - 1), a, d // a)
        if layer["mixer"] != ATTENTION:
            a, inside = layer["memory_heads"], "recall." if both else ""
            yield inside + "memory.matrix_bhkv", (1, a, d // a, d // a)
            if layer["has_momentum"]:
                yield inside + "memory.matrix_momentum_bhkv", (1, a, d // a, d // a)
            yield inside + "conv.tail_bsd", (1, layer["taps"] - 1, 3 * d)

    def _begin(self, index, name, shape):
        return self.weights.get(f"begin.{index}.{name}", np.zeros(shape)).reshape(shape)

    def read(self, token_ids):
        """Read tokens; the prediction after the last."""
        for token_id in token_ids:
            if not 0 <= token_id < self.said["vocabulary"]:
                raise ValueError(f"token {token_id} is none of the vocabulary, which ends at {len(self.pieces) - 1}.")
        for token_id in token_ids:
            x = self.weights["embedding"][token_id]
            for index, layer in enumerate(self.layers):
                x = x + self._mixed(index, layer, self._normed(x, f"layers.{index}.mixer_norm"))
                before, x = x, x + self._fed(index, layer, self._normed(x, f"layers.{index}.mlp_norm"))
            x = self._normed(x, "norm")
            if self.learned is None:
                self.logits = self._head() @ x
            else:
                self.logits = self._learned_from(before if self.learning["which"] == "last_mlp" else x, token_id)
            self.n_tokens += 1
        return self.logits

    def step(self):
        """Read the likeliest token, and give it."""
        token_id = int(np.argmax(self.logits))
        self.read([token_id])
        return token_id

    def _head(self):
        return self.weights.get("head", self.weights["embedding"])

    def _still(self, learning):
        """The weights of the model that learn, by the names of their changes."""
        if learning["which"] == "head":
            return {"head_bod": self._head()}
        last = f"layers.{len(self.layers) - 1}."
        return {"up_bfd": self.weights[last + "up"], "out_bdf": self.weights[last + "down"]}

    def _first_rate(self, learning):
        return self.said["learn_rates"][learning["which"]] if learning["lr"] is None else learning["lr"]

    def _learned_from(self, hidden, token_id):
        """The prediction after a token; the chunk before it, if that is whole, is learned first."""
        own = self.learned
        if len(own["hidden"]) == self.learning["chunk"]:
            self._stepped(np.array(own["hidden"]), [*own["tokens"][1:], token_id])
            own["hidden"], own["tokens"] = [], []
        own["hidden"].append(hidden)
        own["tokens"].append(token_id)
        logits, _ = self._tail(hidden[None], self._moved())
        if not own["steps_b"]:
            return logits[0]
        share = softmax(logits[0])
        share = share if share.sum() > 0 else np.full_like(share, 1 / len(share))
        return np.log((1 - UNIFORM) * share + UNIFORM / len(share))

    def _moved(self):
        return {name: w + self.learned["delta"][name] for name, w in self._still(self.learning).items()}

    def _tail(self, hidden, weights):
        """Logits of some tokens, and what gives the gradient of the weights from that of the logits."""
        if self.learning["which"] == "head":
            return hidden @ weights["head_bod"].T, lambda wrong: {"head_bod": wrong.T @ hidden}
        index, eps = len(self.layers) - 1, self.said["eps"]
        is_gated = self.layers[index]["mlp"] == 0
        n = self._normed(hidden, f"layers.{index}.mlp_norm")
        up = n @ weights["up_bfd"].T + (0 if is_gated else self.weights[f"layers.{index}.up_bias"])
        if is_gated:
            gate, value = np.split(up, 2, -1)
            inner = gate * sigmoid(gate) * value
        else:
            inner = up * 0.5 * (1 + erf(up / np.sqrt(2)))
        z = hidden + inner @ weights["out_bdf"].T + (0 if is_gated else self.weights[f"layers.{index}.down_bias"])

        def back(wrong):
            by_norm, scale = wrong @ self._head() * self.weights["norm"], np.mean(z * z, -1, keepdims=True) + eps
            by_z = by_norm / np.sqrt(scale) - z * np.mean(z * by_norm, -1, keepdims=True) / scale**1.5
            by_inner = by_z @ weights["out_bdf"]
            if is_gated:
                slope = sigmoid(gate) * (1 + gate * (1 - sigmoid(gate)))
                by_up = np.concatenate([by_inner * value * slope, by_inner * gate * sigmoid(gate)], -1)
            else:
                slope = 0.5 * (1 + erf(up / np.sqrt(2))) + up * np.exp(-up * up / 2) / np.sqrt(2 * np.pi)
                by_up = by_inner * slope
            return {"up_bfd": by_up.T @ n, "out_bdf": by_z.T @ inner}

        return self._normed(z, "norm") @ self._head().T, back

    def _stepped(self, hidden, targets):
        """What a whole chunk makes of what was learned (meristem.models.weights): one step, or the guard drops it."""
        own, n_ids, at = self.learned, self.said["vocabulary"], (np.arange(len(targets)), targets)
        static_nats = -np.log(softmax(self._tail(hidden, self._still(self.learning))[0])[at]).mean()
        logits, back = self._tail(hidden, self._moved())
        share = softmax(logits)
        nats = -np.log((1 - UNIFORM) * share[at] + UNIFORM / n_ids).mean() if own["steps_b"] else static_nats
        share[at] -= 1
        found = back(share / len(targets))
        balance = min(0.0, own["balance_b"] + static_nats - nats)
        is_worse = not balance >= -MARGIN_NATS and own["steps_b"] > 0
        clip, length = self.learning["grad_clip"], np.sqrt(sum((g * g).sum() for g in found.values()))
        moved = {n: own["delta"][n] - own["rate_b"] * clip / max(length, clip) * g for n, g in found.items()}
        is_dropped = is_worse or not all(np.isfinite(d).all() for d in moved.values())
        rate, saved = own["rate_b"], own["saved_b"] + static_nats - nats
        if is_dropped:
            moved, balance = {name: np.zeros_like(d) for name, d in moved.items()}, 0.0
            rate = rate if own["saved_b"] >= MARGIN_NATS + np.log(n_ids / UNIFORM) else rate / 2
            rate, saved = (
                rate if np.float32(rate) > np.float32(self._first_rate(self.learning) / 2**MOST_DROPS) else 0.0,
                0.0,
            )
        own["n_chunks"] += 1
        own["mean_nats_b"] += ((static_nats if is_worse else nats) - own["mean_nats_b"]) / own["n_chunks"]
        own["steps_b"] = 0.0 if is_dropped or not rate else own["steps_b"] + 1
        own["rate_b"], own["balance_b"], own["saved_b"] = rate, balance, saved
        own["delta"] = {name: kept(d) for name, d in moved.items()}

    def _normed(self, x, name):
        return rms(x, self.weights[name], self.said["eps"])

    def _fed(self, index, layer, x):
        def w(name):
            return self.weights[f"layers.{index}.{name}"]

        up = w("up") @ x
        if layer["mlp"] == 0:  # SwiGLU
            gate, up = np.split(up, 2)
            return w("down") @ (gate * sigmoid(gate) * up)
        up = up + w("up_bias")
        return w("down") @ (up * 0.5 * (1 + erf(up / np.sqrt(2)))) + w("down_bias")

    def _mixed(self, index, layer, x):
        def w(name):
            return self.weights[f"layers.{index}.{name}"]

        mixer, eps, d = layer["mixer"], self.said["eps"], len(x)
        state = self.state[index]
        if mixer == ATTENTION:
            return w("attention_out") @ self._attended(layer, x, w, state, "")
        recalled = self._recalled(layer, x, w, state, "" if mixer == MEMORY else "recall.")
        if mixer in (MEMORY, LAYER):
            y = rms(recalled.reshape(layer["memory_heads"], -1), w("memory_norm"), eps).reshape(d)
            y = w("memory_out") @ (y * sigmoid(w("open") @ x + w("open_bias")))
            if mixer == MEMORY:
                return y
            y = y + x if layer["is_residual"] else y
            return w("attention_out") @ self._attended(layer, y, w, state, "attention.")
        y, how = self._attended(layer, x, w, state, "attention."), layer["combine"]
        if how == SIGMOID:
            return w("attention_out") @ (y * sigmoid(recalled))
        if how == ADDITIVE:
            recalled = rms(recalled.reshape(layer["memory_heads"], -1), w("memory_norm"), eps).reshape(d)
            return w("attention_out") @ (y + recalled * sigmoid(w("open") @ x + w("open_bias")))
        recalled = rms(recalled, w("memory_norm"), eps)
        if how == PROJECTED:
            recalled = w("open") @ recalled
        if how in (NORMALISED, PROJECTED):
            y = rms(y, w("attention_norm"), eps)
        return w("attention_out") @ (y * sigmoid(recalled + w("open_bias")))

    def _attended(self, layer, x, w, state, inside):
        """Sliding-window attention of one token, before its last projection."""
        a, span, d = layer["attention_heads"], layer["span"], len(x)
        k = d // a
        query, key, value = np.split(w("attention") @ x, 3)
        keys = np.concatenate([state[inside + "keys_bshk"][0], key.reshape(1, a, k)])
        values = np.concatenate([state[inside + "values_bshv"][0], value.reshape(1, a, k)])
        n = len(keys)
        state[inside + "keys_bshk"] = keys[None, max(n - span + 1, 0) :] if span > 1 else keys[None, :0]
        state[inside + "values_bshv"] = values[None, max(n - span + 1, 0) :] if span > 1 else values[None, :0]
        query = query.reshape(a, k) / np.sqrt(k)
        seen = keys
        if layer["is_rotated"]:
            # A key that was read t tokens ago is turned back by t.
            angle = np.arange(n - 1, -1, -1)[:, None, None] * 10000.0 ** (-2 * np.arange(k // 2) / k)
            left, right = np.split(keys, 2, -1)
            cosine, sine = np.cos(angle), np.sin(angle)
            seen = np.concatenate([left * cosine + right * sine, right * cosine - left * sine], -1)
        if layer["n_pinned"]:
            seen = np.concatenate([w("pinned_keys").reshape(-1, a, k), seen])
            values = np.concatenate([w("pinned_values").reshape(-1, a, k), values])
        score = np.einsum("ak,sak->as", query, seen)
        return np.einsum("as,sak->ak", softmax(score), values).reshape(d)

    def _recalled(self, layer, x, w, state, inside):
        """What the memory gives for one token, which it learns: S <- m S + r k (v - slope M k), M <- retain M + S."""
        a, d, tail = layer["memory_heads"], len(x), inside + "conv.tail_bsd"
        window = np.concatenate([state[tail][0], (w("memory") @ x)[None]])
        state[tail] = window[None, 1:]
        u = np.einsum("dt,td->d", w("conv"), window)
        query, key, value = (u * sigmoid(u)).reshape(3, a, d // a)
        query, key = unit(query), unit(key)
        name = inside + "memory.matrix_bhkv"
        matrix = state[name][0]
        if not layer["is_writing"]:
            return np.einsum("ak,akv->av", query, matrix).reshape(d)
        write, retain, momentum = self._gates(layer, w, x)
        if layer["is_proximal"]:
            write = write / (1 + write * (key * key).sum(-1))
        probe = layer["slope"] * (retain if layer["is_warm"] else 1.0) * np.ones(a)
        wrong = write[:, None] * (value - probe[:, None] * np.einsum("ak,akv->av", key, matrix))
        moved = np.einsum("ak,av->akv", key, wrong)
        if layer["has_momentum"]:
            moved = moved + momentum[:, None, None] * state[inside + "memory.matrix_momentum_bhkv"][0]
            state[inside + "memory.matrix_momentum_bhkv"] = moved[None]
        after = retain[:, None, None] * matrix + moved
        state[name] = after[None]
        return np.einsum("ak,akv->av", query, matrix if layer["reads_before"] else after).reshape(d)

    def _gates(self, layer, w, x):
        """Write rate, retain factor and momentum of each head, inside the region where no memory runs away."""
        a = layer["memory_heads"]
        raw = list((w("gates") @ x + w("gate_bias")).reshape(-1, a))
        raw_write = raw.pop(0)
        raw_retain = raw.pop(0) if layer["has_retain_gate"] else None
        raw_momentum = raw.pop(0) if layer["has_momentum"] else None
        write = layer["write_limit"] * sigmoid(raw_write)
        if layer["is_scaled"]:
            write = write * (1 - sigmoid(raw_momentum))
        log_retain, momentum = np.zeros(a), np.zeros(a)
        if layer["has_retain"]:
            least = write / 65536
            log_retain = -(least if raw_retain is None else np.hypot(log_sigmoid(raw_retain), least))
        retain = np.exp(log_retain)
        if layer["has_momentum"]:
            most = w("most_momentum")
            log_most = np.maximum(np.log(most) + (log_retain if layer["is_coasting"] else 0), -1e4)
            log_momentum = log_sigmoid(raw_momentum)
            momentum = np.exp(log_momentum - excess(log_momentum - log_most))
        if layer["curvature"] > 0:
            limit = 0.9 / layer["curvature"] * (1 + retain)
            if layer["has_momentum"]:
                room = 0.9 / layer["curvature"] * (1 - most)
                limit = room + room * retain - 2 * (room / most) * momentum
            of_limit = np.maximum(write / np.maximum(limit, 1e-30), 1e-30)
            write = write / np.exp(excess(np.log(of_limit)))
        return write, retain, momentum

    def save(self, path):
        """Write a session file, which `meristem.Session.load`, `chat` and the C core open."""
        own = {part: self.said[part] for part in ("model", "tokenizer")}
        begun = {"id": hashlib.sha256(str(self.n_tokens).encode()).hexdigest()[:32], "name": "edge"}
        begun |= {"learn": "memory"} if self.learning is None else {"learn": "weights", "learning": self.learning}
        turn = self.header.get("turn", 0) + 1
        header = begun | own | self.header | {"n_tokens": self.n_tokens, "turn": turn, "is_open": False}
        tensors = {} if self.logits is None else {"logits_bo": self.logits[None]}
        for index, state in enumerate(self.state if tensors else []):
            tensors |= {f"state.layer.{index}.{name}": leaf for name, leaf in state.items()}
        if tensors and self.learned is not None:
            tensors |= {f"state.learned.{name}": leaf for name, leaf in self._learned_leaves().items()}
        versions = {"schema": f"{SESSION}/{self.said['session']}", "state": str(self.said["state"])}
        Path(path).write_bytes(packed(tensors, versions | {"session": json.dumps(header)}))

    def _learned_leaves(self):
        """What was learned, as a session file has it."""
        own = self.learned
        leaves = {"n_chunks": np.array(own["n_chunks"]), "tokens_bt": np.array([own["tokens"]])}
        leaves |= {name: np.array([own[name]]) for name in SCALARS} | {"hidden_btd": np.array([own["hidden"]])}
        return leaves | {f"delta.{name}": delta[None] for name, delta in own["delta"].items()}

    def _learned_of(self, held, how):
        """What was learned, from the leaves of a session file, which are taken out of ``held``."""
        names = ["n_chunks", "tokens_bt", *SCALARS, "hidden_btd", *(f"delta.{name}" for name in KINDS[how["which"]])]
        leaves = {name: held.pop(f"state.learned.{name}", np.empty(0)) for name in names}
        n = leaves["tokens_bt"].size
        shapes = dict.fromkeys(SCALARS, (1,)) | {"n_chunks": (), "tokens_bt": (1, n)}
        shapes |= {"hidden_btd": (1, n, self.said["width"])}
        shapes |= {f"delta.{name}": (1, *w.shape) for name, w in self._still(how).items()}
        tokens = leaves["tokens_bt"].astype(np.int64).flatten().tolist()
        fits = all(leaves[name].shape == shape and np.isfinite(leaves[name]).all() for name, shape in shapes.items())
        fits = fits and leaves["n_chunks"] >= 0 and 0 < n <= how["chunk"]
        if not (fits and all(0 <= token < self.said["vocabulary"] for token in tokens)):
            raise ValueError("the session does not hold what was learned in it. Take a whole copy.")
        own = {"n_chunks": int(leaves["n_chunks"]), "tokens": tokens, "hidden": list(leaves["hidden_btd"][0])}
        delta = {name: leaves[f"delta.{name}"][0] for name in KINDS[how["which"]]}
        return own | {name: float(leaves[name][0]) for name in SCALARS} | {"delta": delta}

    def _learning_of(self, path, header):
        """What learns in a session, as its header says. ValueError where it is not what learns here."""
        learn, how = header.get("learn", "memory"), header.get("learning", {})
        how = {"which": "mlp", "lr": None, "chunk": 64, "grad_clip": 1.0} | how
        said = learn if learn != "weights" else how["which"]
        if learn not in ("memory", "weights") or (learn == "weights" and how["which"] not in KINDS):
            raise ValueError(f"in the session in {path} learns {said!r}, which nothing here can. Go on in meristem.")
        found = how if learn == "weights" else None
        if self.is_chosen and found != self.learning:
            raise ValueError(f"the session in {path} was saved while {said!r} learned in another way than here.")
        return found

    def load(self, path):
        """Go on with a saved session of this model, in which learns what did where it was saved."""
        tensors, said = tensors_of(Path(path).read_bytes())
        expected = f"{SESSION}/{self.said['session']}", str(self.said["state"])
        if (said.get("schema"), said.get("state")) != expected:
            raise ValueError(f"{path} is of version {said.get('schema')!r}, and this runtime reads {expected[0]!r}.")
        header = json.loads(said["session"])
        for part in ("model", "tokenizer"):
            if header.get(part) != self.said[part]:
                raise ValueError(f"the session in {path} belongs to another {part}.")
        learning = self._learning_of(path, header)
        held = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
        logits, state, n_held = held.pop("logits_bo", None), [], header["n_tokens"]
        for index, layer in enumerate(self.layers):
            leaves = dict(self._leaves(layer, n_held))
            if logits is not None:
                state.append({name: held.pop(f"state.layer.{index}.{name}", np.empty(0)) for name in leaves})
                wrong = [name for name, leaf in state[-1].items() if leaf.shape != leaves[name]]
                if wrong:
                    raise ValueError(f"{path} lacks {', '.join(wrong)} of layer {index}. Take a whole copy.")
        learned = self._learned_of(held, learning) if learning and logits is not None else None
        numbers = [leaf for each in state for leaf in each.values()] + ([] if logits is None else [logits])
        if held or not all(np.isfinite(leaf).all() for leaf in numbers):
            raise ValueError(f"{path} holds what is no number, or more than a reader of this model carries.")
        self.learning = learning
        self.forget()
        self.header, self.n_tokens = header, n_held
        if logits is not None:
            self.state, self.logits, self.learned = state, logits[0], learned


SPACES = set("\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000") | {chr(c) for c in range(0x2000, 0x200B)}
ENDINGS = ("s", "t", "re", "ve", "m", "ll", "d")


def words_of(text):
    """The words in which byte pairs are looked for (Radford et al. 2019): a space belongs to the word behind it."""
    at = 0
    while at < len(text):
        ending = next((e for e in ENDINGS if text[at] == "'" and text.startswith(e, at + 1)), None)
        begin = at + (text[at] == " " and at + 1 < len(text) and _class(text[at + 1]) != " ")
        what = _class(text[begin])
        end = begin + 1
        while end < len(text) and _class(text[end]) == what:
            end += 1
        if ending is not None:
            end = at + 1 + len(ending)
        elif what == " " and end < len(text) and end - at > 1:
            end -= 1  # the last space goes with the word behind it
        yield text[at:end]
        at = end


def _class(character):
    """A space, L for a letter, N for a digit, or something else."""
    if character in SPACES:
        return " "
    first = unicodedata.category(character)[0]  # of letters, of digits
    return first if first in "LN" else "?"


class Tokenizer:
    """Texts to ids, of the two kinds that meristem makes: bytes, and byte pairs. ValueError for others."""

    def __init__(self, path):
        described = json.loads(Path(path).read_bytes())
        self.is_byte = described.get("kind") == "byte"
        plain = described.get("model", {}).get("type") == "BPE" and not described.get("added_tokens")
        if not self.is_byte and not (plain and (described.get("pre_tokenizer") or {}).get("type") == "ByteLevel"):
            raise ValueError(f"{path} is of a kind that this runtime does not encode; give ids.")
        if not self.is_byte:
            self.ids = described["model"]["vocab"]
            self.ranks = {tuple(pair): rank for rank, pair in enumerate(described["model"]["merges"])}
        shown = [b for b in range(256) if chr(b).isprintable() and b not in (32, 173) and (b < 127 or b > 160)]
        hidden = [b for b in range(256) if b not in shown]
        self.signs = {b: chr(b) for b in shown} | {b: chr(256 + n) for n, b in enumerate(hidden)}

    def encode(self, text):
        if self.is_byte:
            return list(text.encode())
        return [self.ids[part] for word in words_of(text) for part in self._parts(word)]

    def _parts(self, word):
        parts = [self.signs[b] for b in word.encode()]
        while len(parts) > 1:
            pairs = enumerate(zip(parts[:-1], parts[1:], strict=True))
            rank, at = min((self.ranks.get(pair, len(self.ranks)), at) for at, pair in pairs)
            if rank == len(self.ranks):
                break
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        return parts


def main():
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", nargs="?", default="")
    parser.add_argument("--model", default=here / "model.safetensors")
    parser.add_argument("--session", help="go on with this one")
    parser.add_argument("--save", help="write the session to a file")
    parser.add_argument("--tokens", type=int, default=60)
    parser.add_argument("--learn", choices=KINDS, help="what learns beside the memory, in a session that begins")
    asked = parser.parse_args()
    model = Model(asked.model)
    if asked.learn:
        model.learn(asked.learn)
    if asked.session:
        model.load(asked.session)
    model.read(Tokenizer(here / "tokenizer.json").encode(asked.text or ("" if model.n_tokens else "\n")))
    for _ in range(asked.tokens):
        sys.stdout.buffer.write(model.pieces[model.step()])
        sys.stdout.flush()
    sys.stdout.write("\n")
    if asked.save:
        model.save(asked.save)


if __name__ == "__main__":
    main()
