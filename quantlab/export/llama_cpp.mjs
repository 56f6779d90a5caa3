// llama.cpp on one GGUF file, on one thread of the CPU. The request comes as JSON on stdin, the answer goes to stdout.
//   package: index.js of node-llama-cpp   model: the file   context: tokens
//   windows: [[token, ...], ...], out: where the probabilities after each token go, as float32
//   prompt: [token, ...], tokens: how many to write after it, rounds: how often (the least time counts)
import { readFileSync, openSync, writeSync, closeSync } from "node:fs";
import { pathToFileURL } from "node:url";

const ask = JSON.parse(readFileSync(0));
const { getLlama } = await import(pathToFileURL(ask.package));
const llama = await getLlama({ gpu: false, build: "never", skipDownload: true, maxThreads: 1, logLevel: "error" });
const model = await llama.loadModel({ modelPath: ask.model });
const context = await model.createContext({ contextSize: ask.context, batchSize: ask.context, threads: 1 });
const sequence = context.getSequence();
const answer = {};

if (ask.windows) {
    const vocabulary = model.fileInfo.metadata.llama.vocab_size;
    const options = { temperature: 1, topK: 0, topP: 1, minP: 0 }; // by default all but 40 tokens are cut away
    const file = openSync(ask.out, "w");
    for (const window of ask.windows) {
        await sequence.clearHistory();
        const rows = await sequence.controlledEvaluate(
            window.map((token) => [token, { generateNext: { probabilities: true, options } }]));
        for (const row of rows) {
            const all = new Float32Array(vocabulary);
            for (const [token, probability] of row.next.probabilities) all[token] = probability;
            writeSync(file, Buffer.from(all.buffer));
        }
    }
    closeSync(file);
}

if (ask.text !== undefined) answer.ids = model.tokenize(ask.text);

if (ask.prompt) {
    const cpu = () => process.cpuUsage().user / 1e6;
    answer.decode = Infinity;
    for (let round = 0; round < ask.rounds; round += 1) {
        await sequence.clearHistory();
        await sequence.evaluateWithoutGeneratingNewTokens(ask.prompt.slice(0, -1));
        answer.said = [];
        const began = cpu();
        const writing = sequence.evaluate(ask.prompt.slice(-1), { temperature: 0, yieldEogToken: true });
        for await (const token of writing) {
            answer.said.push(token);
            if (answer.said.length === ask.tokens) break;
        }
        answer.decode = Math.min(answer.decode, (cpu() - began) / answer.said.length);
    }
    answer.written = model.detokenize(answer.said);
}
console.log(JSON.stringify(answer));
process.exit(0);
