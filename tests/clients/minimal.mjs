// A TensorNext client without any library, written from docs/protocol.md alone: ZMTP over a TCP socket, MessagePack by
// hand. It asks for health and for the metadata of `mlp`, runs the model once, makes one mistake on purpose, and prints
// what came back as one line of JSON.
//
//     node minimal.mjs tcp://127.0.0.1:5555

import net from "node:net";

// --- MessagePack ------------------------------------------------------------------------------------------------

// Numbers are written as integers if they are whole: the protocol reads an integer for a float.
function pack(value) {
  if (value === null) return Buffer.from([0xc0]);
  if (typeof value === "boolean") return Buffer.from([value ? 0xc3 : 0xc2]);
  if (typeof value === "string") {
    const text = Buffer.from(value, "utf8");
    const head = Buffer.from([0xdb, 0, 0, 0, 0]);
    head.writeUInt32BE(text.length, 1);
    return Buffer.concat([head, text]);
  }
  if (typeof value === "number") {
    const bytes = Buffer.alloc(9);
    if (Number.isInteger(value)) {
      bytes[0] = 0xd3;
      bytes.writeBigInt64BE(BigInt(value), 1);
    } else {
      bytes[0] = 0xcb;
      bytes.writeDoubleBE(value, 1);
    }
    return bytes;
  }
  const list = Array.isArray(value);
  const items = list ? value : Object.entries(value).flat();
  const head = Buffer.from([list ? 0xdd : 0xdf, 0, 0, 0, 0]);
  head.writeUInt32BE(list ? items.length : items.length / 2, 1);
  return Buffer.concat([head, ...items.map(pack)]);
}

function unpack(bytes) {
  let at = 0;
  const take = (count) => bytes.subarray(at, (at += count));
  const uint = (count) => {
    const digits = take(count);
    return count === 8 ? Number(digits.readBigUInt64BE()) : digits.readUIntBE(0, count);
  };
  const int = (count) => {
    const digits = take(count);
    return count === 8 ? Number(digits.readBigInt64BE()) : digits.readIntBE(0, count);
  };
  const text = (count) => take(count).toString("utf8");
  const array = (count) => Array.from({ length: count }, next);
  const map = (count) => Object.fromEntries(Array.from({ length: count }, () => [next(), next()]));
  function next() {
    const lead = uint(1);
    if (lead < 0x80) return lead;
    if (lead < 0x90) return map(lead & 0x0f);
    if (lead < 0xa0) return array(lead & 0x0f);
    if (lead < 0xc0) return text(lead & 0x1f);
    if (lead >= 0xe0) return lead - 0x100;
    switch (lead) {
      case 0xc0: return null;
      case 0xc2: return false;
      case 0xc3: return true;
      case 0xca: return take(4).readFloatBE();
      case 0xcb: return take(8).readDoubleBE();
      case 0xcc: case 0xcd: case 0xce: case 0xcf: return uint(1 << (lead - 0xcc));
      case 0xd0: case 0xd1: case 0xd2: case 0xd3: return int(1 << (lead - 0xd0));
      case 0xd9: case 0xda: case 0xdb: return text(uint(1 << (lead - 0xd9)));
      case 0xdc: case 0xdd: return array(uint(2 << (lead - 0xdc)));
      case 0xde: case 0xdf: return map(uint(2 << (lead - 0xde)));
      default: throw new Error(`MessagePack type 0x${lead.toString(16)} has no place in this protocol`);
    }
  }
  const value = next();
  if (at !== bytes.length) throw new Error(`${bytes.length - at} bytes behind the value`);
  return value;
}

// --- ZMTP -------------------------------------------------------------------------------------------------------

const MORE = 1, LONG = 2, COMMAND = 4;

class Connection {
  constructor(socket) {
    this.socket = socket;
    this.chunks = socket[Symbol.asyncIterator]();
    this.buffer = Buffer.alloc(0);
  }

  static async open(host, port) {
    const connection = new Connection(net.connect({ host, port, noDelay: true }));
    const greeting = Buffer.alloc(64);
    greeting[0] = 0xff;
    greeting[9] = 0x7f;
    greeting.set([3, 1], 10);
    greeting.write("NULL", 12);
    connection.socket.write(greeting);
    const theirs = await connection.read(64);
    if (theirs[10] < 3) throw new Error(`ZMTP ${theirs[10]} is too old`);
    const type = Buffer.from("\0\0\0\x06DEALER", "latin1");
    connection.sendFrame(COMMAND, Buffer.concat([Buffer.from("\x05READY\x0bSocket-Type", "latin1"), type]));
    const ready = await connection.readFrame();
    if (!(ready.flags & COMMAND) || ready.body.toString("latin1", 0, 6) !== "\x05READY") {
      throw new Error(`refused: ${ready.body.toString("latin1")}`);
    }
    return connection;
  }

  async read(count) {
    while (this.buffer.length < count) {
      const { value, done } = await this.chunks.next();
      if (done) throw new Error("the daemon closed the connection");
      this.buffer = Buffer.concat([this.buffer, value]);
    }
    const bytes = this.buffer.subarray(0, count);
    this.buffer = this.buffer.subarray(count);
    return bytes;
  }

  async readFrame() {
    const flags = (await this.read(1))[0];
    const length = flags & LONG ? Number((await this.read(8)).readBigUInt64BE()) : (await this.read(1))[0];
    return { flags, body: await this.read(length) };
  }

  sendFrame(flags, body) {
    const length = Buffer.alloc(8);
    length.writeBigUInt64BE(BigInt(body.length));
    this.socket.write(Buffer.concat([Buffer.from([flags | LONG]), length, body]));
  }

  send(frames) {
    frames.forEach((body, index) => this.sendFrame(index + 1 < frames.length ? MORE : 0, body));
  }

  async receive() {
    const frames = [];
    for (;;) {
      const { flags, body } = await this.readFrame();
      if (flags & COMMAND) {
        if (body.toString("latin1", 0, 5) === "\x04PING") {
          this.sendFrame(COMMAND, Buffer.concat([Buffer.from("\x04PONG", "latin1"), body.subarray(7)]));
        }
        continue;
      }
      frames.push(body);
      if (!(flags & MORE)) return frames;
    }
  }
}

// --- TensorNext -------------------------------------------------------------------------------------------------

const { hostname, port } = new URL(process.argv[2]);
const connection = await Connection.open(hostname, Number(port));
let lastId = 0;

// One request at a time: the next message is its reply.
async function ask(fields, tensors = []) {
  const id = ++lastId;
  connection.send([pack({ v: 1, id, ...fields }), ...tensors]);
  const [header, ...frames] = await connection.receive();
  const reply = unpack(header);
  if (reply.v !== 1 || reply.id !== id) throw new Error(`unexpected reply ${JSON.stringify(reply)}`);
  return [reply, frames];
}

// FP32, little-endian on every machine.
function encodeFloats(values) {
  const bytes = Buffer.alloc(4 * values.length);
  values.forEach((value, index) => bytes.writeFloatLE(value, 4 * index));
  return bytes;
}

function decodeFloats(bytes) {
  return Array.from({ length: bytes.length / 4 }, (_, index) => bytes.readFloatLE(4 * index));
}

const [health] = await ask({ type: "health" });
const [metadata] = await ask({ type: "metadata", model: "mlp" });
const [name, datatype, [, width]] = metadata.model.inputs[0];
const rows = 3;
const values = Array.from({ length: rows * width }, (_, index) => (index % 7) / 8);
const request = { type: "predict", model: "mlp", inputs: [[name, datatype, [rows, width]]] };
const [result, frames] = await ask(request, [encodeFloats(values)]);
const wrong = { ...request, model: "mpl", prefer_gpu: false, min_gpu_memory_mb: 0.5 };
const [mistake] = await ask(wrong, [encodeFloats(values)]);
connection.socket.destroy();

console.log(JSON.stringify({ health, metadata, result, values: frames.map(decodeFloats), mistake }));
