"""A pretrained sentence encoder learns from a few hundred movie reviews with LoRA, alone or with νSAM.

python examples/lora.py --encoder all-MiniLM-L6-v2 --sentences hutto_ICWSM_2014 --method full --rho 0.001

The encoder is a folder or a name on the Hugging Face hub; the sentences are in hutto_ICWSM_2014.tar.gz of the source
distribution of vaderSentiment 0.5 (Hutto & Gilbert, 2014), with mean ratings of -4 to 4.
"""

import argparse
from pathlib import Path

import peft
import torch
import transformers
from torch.utils.data import DataLoader, Subset, random_split

import nusam

METHODS = {  # what νSAM perturbs beside LoRA's own training
    "lora": None,
    "factors": "trainable",  # LoRA's factors and the head
    "full": "frozen",  # the base weights in their full space, in the forward, without a gradient or a write
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="sentence-transformers/all-MiniLM-L6-v2")
    parser.add_argument("--sentences", type=Path, required=True, help="the folder hutto_ICWSM_2014")
    parser.add_argument("--method", choices=METHODS, default="full")
    parser.add_argument("--rho", type=float, default=0.001)
    parser.add_argument("--ascent-share", type=float, default=1 / 8, help="of each batch, to find ε with")
    parser.add_argument("--bits", type=int, choices=[4, 8], help="quantize the base, by bitsandbytes")
    parser.add_argument("--train", type=int, default=250, help="sentences to learn from")
    parser.add_argument("--test", type=int, default=800, help="sentences to judge by")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    reviews = args.sentences / "movieReviewSnippets_GroundTruth.txt"
    if not reviews.is_file():
        parser.error(f"--sentences must be a folder with {reviews.name}, which {args.sentences} does not hold.")

    torch.manual_seed(args.seed)
    transformers.utils.logging.set_verbosity_error()
    rows = [row.split("\t") for row in reviews.read_text(errors="replace").strip().split("\n")]
    data = [(text.strip(), int(float(rating) > 0)) for _, rating, text in rows if abs(float(rating)) >= 0.5]
    sizes = [args.train, 300, args.test]
    train, validation, test, _ = random_split(data, [*sizes, len(data) - sum(sizes)])
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.encoder)

    def collate(rows: list[tuple[str, int]]) -> transformers.BatchEncoding:
        texts, labels = zip(*rows, strict=True)
        batch = tokenizer(list(texts), padding=True, truncation=True, max_length=32, return_tensors="pt")
        return transformers.BatchEncoding({**batch, "labels": torch.tensor(labels)})

    device = "cuda" if torch.cuda.is_available() else "cpu"
    quantized = {
        "load_in_4bit": args.bits == 4,
        "load_in_8bit": args.bits == 8,
        "llm_int8_skip_modules": ["classifier"],
    }
    config = transformers.BitsAndBytesConfig(**quantized) if args.bits else None
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        args.encoder, num_labels=2, quantization_config=config, device_map=device
    )
    adapters = peft.LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules="all-linear")
    model = peft.get_peft_model(base, adapters)

    opt = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=args.lr)
    loader = DataLoader(train, batch_size=25, shuffle=True, collate_fn=collate)
    steps = args.epochs * len(loader)
    if METHODS[args.method]:
        options = {"targets": METHODS[args.method], "ascent_share": args.ascent_share}
        opt = nusam.NuSAM(opt, args.rho, delay=steps // 10, model=model, **options)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps)

    def accuracy(part: Subset) -> float:
        model.eval()
        in_order = sorted(part, key=lambda row: len(row[0]))  # sentences of a batch alike in length
        batches = DataLoader(in_order, batch_size=100, collate_fn=collate)
        with torch.no_grad():
            right = sum((model(**b.to(device)).logits.argmax(1) == b["labels"]).sum().item() for b in batches)
        return right / len(part)

    for epoch in range(args.epochs):
        model.train()
        total = 0.0
        for batch in loader:
            batch = batch.to(device)
            for part in opt.passes(batch) if args.method != "lora" else [batch]:
                loss = model(**part).loss
                loss.backward()
            opt.step()
            opt.zero_grad()
            schedule.step()
            total += loss.item()
        print(f"epoch {epoch}: loss {total / len(loader):.4f}", flush=True)
    print(f"validation accuracy {accuracy(validation):.2%}, test accuracy {accuracy(test):.2%}")


if __name__ == "__main__":
    main()
