//! What is trained: its names and groups, and that it is written and read exactly.

use std::collections::BTreeSet;

use burn::tensor::FloatDType;
use safetensors::tensor::{Dtype, TensorView};

use super::*;
use crate::fusion::PREFIX;
use crate::{Mode, ModelError};

type Stored = Vec<(String, Vec<usize>, Vec<u8>)>;

fn read(path: &Path) -> Stored {
    let bytes = std::fs::read(path).unwrap();
    let stored = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let tensors = stored.tensors().into_iter();
    tensors
        .map(|(name, view)| (name, view.shape().to_vec(), view.data().to_vec()))
        .collect()
}

fn write(path: &Path, tensors: &Stored) {
    let views = tensors.iter().map(|(name, shape, bytes)| {
        (
            name.as_str(),
            TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap(),
        )
    });
    std::fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

#[test]
fn what_is_trained_is_named_grouped_and_counted() {
    let mut model = load("bert", Pooling::Mean);
    struct Leaves;
    impl ParameterVisitor for Leaves {
        fn visit<const D: usize>(&mut self, name: &str, _: ParameterGroup, tensor: &mut Tensor<D>) {
            assert!(tensor.is_require_grad(), "{name} is a leaf");
            assert_eq!(tensor.dtype(), burn::tensor::DType::F32, "{name}");
        }
    }
    model.visit_trainable(&mut Leaves);
    let all = trained(&model).0;
    let names: BTreeSet<&str> = all.iter().map(|(name, ..)| name.as_str()).collect();
    assert_eq!(names.len(), all.len(), "names are unique");
    let count = |wanted: ParameterGroup| -> u64 {
        let groups = all.iter().filter(|(_, group, ..)| *group == wanted);
        groups.map(|(.., numbers)| numbers.len() as u64).sum()
    };
    for (name, group, ..) in &all {
        let expected = match name.strip_prefix(PREFIX) {
            None if name.starts_with("classifier") => ParameterGroup::Head,
            None => ParameterGroup::Adapter,
            Some(name) if name.contains(".encoder.") => ParameterGroup::Encoder,
            Some(_) => ParameterGroup::Projector,
        };
        assert_eq!(*group, expected, "{name}");
    }
    let size = model.size();
    assert_eq!(size.encoder_parameters, count(ParameterGroup::Encoder));
    assert_eq!(size.projector_parameters, count(ParameterGroup::Projector));
    assert_eq!(size.adapter_parameters, count(ParameterGroup::Adapter));
    assert_eq!(size.head_parameters, count(ParameterGroup::Head));
    assert_eq!(size.tower_parameters, 0);
    let checkpoint = Checkpoint::open(&fixture("bert")).unwrap();
    let plain = model_options(Pooling::Mean, None);
    let plain = Model::load(&checkpoint, &plain, &device()).unwrap().size();
    assert_eq!(size.base_parameters, plain.base_parameters);
    assert_eq!(size.embedding_parameters, plain.embedding_parameters);
    assert_eq!(
        (plain.encoder_parameters, plain.projector_parameters),
        (0, 0)
    );
    // Stream by stream, what they share last; every tensor of the contract is there.
    let fused: Vec<&str> = all
        .iter()
        .filter_map(|(name, ..)| name.strip_prefix(PREFIX))
        .collect();
    let mut order: Vec<&str> = fused
        .iter()
        .filter_map(|name| name.split('.').next())
        .collect();
    order.dedup();
    assert_eq!(order, ["xray", "ecg", "labs", "genes", "voice", "shared"]);
    for name in [
        "genes.resampler.queries",
        "genes.projector.second.bias",
        "genes.type",
    ] {
        assert!(fused.contains(&name), "{name}");
    }
}

#[test]
fn new_weights_are_the_seeds_alone() {
    let with = |seed| {
        let checkpoint = Checkpoint::open(&fixture("bert")).unwrap();
        let options = model_options(Pooling::Mean, Some(options(seed)));
        trained(&Model::load(&checkpoint, &options, &device()).unwrap())
    };
    let (first, again, other) = (with(1), with(1), with(2));
    let mut drawn = 0;
    for (index, (name, .., numbers)) in first.0.iter().enumerate() {
        assert_eq!(numbers, &again.0[index].3, "{name}");
        drawn += usize::from(numbers != &other.0[index].3);
    }
    // Biases, norms and what starts at zero or the mean do not depend on the seed.
    assert!(drawn > 50 && drawn < first.0.len(), "{drawn}");
    // Two streams of one kind are not twins.
    let tensor = |name: &str| first.0.iter().find(|(stored, ..)| stored == name).unwrap();
    assert_ne!(
        tensor("fusion.xray.resampler.blocks.0.key.weight").3,
        tensor("fusion.ecg.resampler.blocks.0.key.weight").3
    );
}

#[test]
fn what_is_saved_is_read_to_the_same_bits() {
    for (base, pooling) in MODELS {
        let model = moved(base, pooling);
        let folder = tempfile::tempdir().unwrap();
        model.save_adapter(folder.path(), base).unwrap();
        let checkpoint = Checkpoint::open(&fixture(base)).unwrap();
        let read = Model::load_with_adapter(&checkpoint, folder.path(), FloatDType::F32, &device())
            .unwrap_or_else(|error| panic!("{base}: {error}"));
        assert_eq!(read.options().fusion, model.options().fusion);
        let bits = |model: &Model| -> Vec<(String, Vec<u32>)> {
            trained(model)
                .0
                .into_iter()
                .map(|(name, _, _, numbers)| {
                    (name, numbers.into_iter().map(f32::to_bits).collect())
                })
                .collect()
        };
        assert_eq!(bits(&read), bits(&model), "{base}");
        let input = pack(&[samples()], 52, 5);
        let logits = |model: &Model| values(model.forward(&input, Mode::Infer));
        assert_eq!(logits(&read), logits(&model), "{base}");
        assert_eq!(
            logits(&read.for_inference()),
            logits(&model.for_inference()),
            "{base}"
        );
        // Into a model with other values, made with another seed.
        let mut options = model_options(pooling, Some(options(9)));
        options.seed = 9;
        let mut other = Model::load(&checkpoint, &options, &device()).unwrap();
        assert_ne!(bits(&other), bits(&model));
        other.load_adapter(folder.path()).unwrap();
        assert_eq!(bits(&other), bits(&model), "{base}");
    }
}

#[test]
fn a_missing_an_extra_and_a_misshapen_tensor_are_named() {
    let model = load("bert", Pooling::Mean);
    let folder = tempfile::tempdir().unwrap();
    model.save_adapter(folder.path(), "bert").unwrap();
    let path = folder.path().join("calor.safetensors");
    let whole = read(&path);
    let load = || {
        let checkpoint = Checkpoint::open(&fixture("bert")).unwrap();
        Model::load_with_adapter(&checkpoint, folder.path(), FloatDType::F32, &device())
    };
    load().unwrap();
    let name = "fusion.genes.encoder.weight";
    let place = whole
        .iter()
        .position(|(stored, ..)| stored == name)
        .unwrap();

    let mut tensors = whole.clone();
    tensors.remove(place);
    write(&path, &tensors);
    let error = load().unwrap_err();
    assert!(
        matches!(&error, ModelError::MissingTensor { tensor, .. } if tensor == name),
        "{error}"
    );

    let mut tensors = whole.clone();
    tensors.push(("fusion.genes.encoder.rest".to_owned(), vec![1], vec![0; 4]));
    write(&path, &tensors);
    let error = load().unwrap_err();
    assert!(
        matches!(&error, ModelError::UnusedTensor { tensor, .. } if tensor.ends_with("rest")),
        "{error}"
    );

    let mut tensors = whole.clone();
    tensors[place].1.reverse();
    write(&path, &tensors);
    let error = load().unwrap_err();
    assert!(
        matches!(&error, ModelError::Shape { tensor, .. } if tensor == name),
        "{error}"
    );
}

#[test]
fn other_streams_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    load("bert", Pooling::Mean)
        .save_adapter(folder.path(), "bert")
        .unwrap();
    let checkpoint = Checkpoint::open(&fixture("bert")).unwrap();
    let into = |fusion: Option<FusionOptions>| {
        let options = model_options(Pooling::Mean, fusion);
        let mut model = Model::load(&checkpoint, &options, &device()).unwrap();
        model.load_adapter(folder.path())
    };
    into(Some(options(8))).unwrap();
    let mut deeper = options(3);
    deeper.streams[0].resampler.depth = 1;
    // The same tensors, and yet another model.
    let mut regrouped = options(3);
    let EncoderSpec::Omics(genes) = &mut regrouped.streams[GENES].encoder else {
        panic!("an omics encoder");
    };
    genes.groups[1] = vec![2, 4];
    for other in [None, Some(deeper), Some(regrouped)] {
        let error = into(other).unwrap_err().to_string();
        assert!(
            error.contains("calor.json") && error.contains("streams"),
            "{error}"
        );
    }
}
