//! Every architecture and adapter variant against what Transformers and PEFT computed.

use std::path::Path;

use crate::common::{device, fixture};
use calor_model::parity::{self, Comparison};

/// f32 sums in another order: the largest difference over all fixtures is below 2e-6 of the
/// tensor's largest magnitude. A missing bias, norm or scaling is at least a hundred times that.
const TOLERANCE: f64 = 1e-5;

fn compare(model: &str, adapter: Option<&str>, reference: &Path) -> Vec<Comparison> {
    let adapter = adapter.map(fixture);
    parity::compare(
        &fixture(model),
        adapter.as_deref(),
        reference,
        TOLERANCE,
        &device(),
    )
    .unwrap_or_else(|error| panic!("{model}: {error}"))
}

fn check(model: &str, adapter: Option<&str>) -> Vec<Comparison> {
    let folder = fixture(adapter.unwrap_or(model));
    let comparisons = compare(model, adapter, &folder.join("reference.safetensors"));
    for comparison in &comparisons {
        assert!(comparison.within, "{model} {adapter:?}: {comparison:?}");
        assert!(comparison.reference_max > 0.0 && comparison.compared > 0);
    }
    comparisons
}

#[test]
fn decoders_agree_in_logits_loss_and_gradients() {
    for model in [
        "llama2",
        "llama3",
        "llama-linear",
        "mistral",
        "qwen2-window",
        "qwen3",
        "qwen3-bias",
        "olmo2",
        "phi3",
        "phi3-long",
        "gpt2",
        "gpt2-scaled",
        "gpt-neox",
        "gpt-neox-serial",
        "gemma2",
        "gemma3",
    ] {
        let comparisons = check(model, None);
        let gradients = comparisons
            .iter()
            .filter(|comparison| comparison.name.starts_with("grad."))
            .count();
        assert!(gradients >= 8, "{model}: {gradients} gradients");
    }
}

#[test]
fn rows_padded_on_the_left_agree_where_tokens_are() {
    let comparisons = check("qwen2", None);
    assert_eq!(comparisons[0].name, "logits");
    // 13 + 4 + 9 tokens of a vocabulary of 120.
    assert_eq!(comparisons[0].compared, 26 * 120);
}

#[test]
fn encoders_agree_in_hidden_states() {
    for model in ["bert", "bert-tanh", "bert-relu", "roberta", "roberta-left"] {
        assert_eq!(check(model, None)[0].name, "last_hidden_state");
    }
}

#[test]
fn encoders_agree_in_hidden_states_and_gradients() {
    for model in [
        "electra",
        "electra-wide",
        "modernbert",
        "modernbert-bias",
        "deberta",
        "deberta-own-keys",
    ] {
        let comparisons = check(model, None);
        assert_eq!(comparisons[0].name, "last_hidden_state");
        assert!(comparisons.len() > 12, "{model}: {}", comparisons.len());
    }
}

#[test]
fn adapters_of_peft_agree() {
    let causal = check("llama2", Some("adapter-causal"));
    assert!(
        causal
            .iter()
            .any(|comparison| comparison.name.ends_with("lora_A.weight"))
    );
    check("llama3", Some("adapter-tied"));
    check("llama3", Some("adapter-output"));
    check("mistral", Some("adapter-llama-classifier"));
    check("bert", Some("adapter-bert-classifier"));
    check("roberta", Some("adapter-roberta-classifier"));
    check("bert", Some("adapter-backbone"));
    for base in [
        "gpt2",
        "phi3",
        "gpt-neox",
        "gemma2",
        "modernbert",
        "deberta",
    ] {
        let comparisons = check(base, Some(&format!("adapter-{base}")));
        let pairs = comparisons
            .iter()
            .filter(|comparison| comparison.name.contains(".lora_"))
            .count();
        assert_eq!(pairs, 4, "{base}");
    }
    check("gpt2", Some("adapter-gpt2-classifier"));
    check("electra", Some("adapter-electra-classifier"));
    check("modernbert", Some("adapter-modernbert-classifier"));
    check("modernbert-bias", Some("adapter-modernbert-mean"));
    check("deberta", Some("adapter-deberta-classifier"));
}

#[test]
fn a_reference_without_the_adapter_differs() {
    let reference = fixture("adapter-causal").join("reference.safetensors");
    // Its gradients of the adapter's own tensors need the adapter.
    let error = parity::compare(&fixture("llama2"), None, &reference, TOLERANCE, &device())
        .unwrap_err()
        .to_string();
    assert!(error.contains("lora_A"), "{error}");
    let reference = fixture("adapter-backbone").join("reference.safetensors");
    let comparison = &compare("bert", None, &reference)[0];
    assert!(!comparison.within && comparison.max_rel > 1e-2);
}

#[test]
fn a_reference_of_another_model_is_refused() {
    let reference = fixture("roberta").join("reference.safetensors");
    let compared = compare("bert", None, &reference);
    assert!(!compared[0].within);
    let logits = fixture("llama2").join("reference.safetensors");
    let error = parity::compare(&fixture("bert"), None, &logits, TOLERANCE, &device())
        .unwrap_err()
        .to_string();
    assert!(error.contains("decoder"), "{error}");
}
