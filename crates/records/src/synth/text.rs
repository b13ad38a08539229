//! Visit notes: each sign of the notes' factors is one of several phrases, among sentences that
//! say nothing of the risk.

use super::model::{Draw, Latent};
use super::random::{Draws, Stream};

/// For each factor, the phrases of −1 and of 1.
const PHRASES: [(Latent, [&str; 3], [&str; 3]); 3] = [
    (
        Latent::Breathlessness,
        [
            "Breathes freely on exertion.",
            "Climbs stairs with ease.",
            "Walks uphill without stopping.",
        ],
        [
            "Breathless on exertion.",
            "Short of breath on the stairs.",
            "Has to stop for breath when walking uphill.",
        ],
    ),
    (
        Latent::Swelling,
        ["Slim ankles.", "Legs are slim.", "Shoes fit as always."],
        [
            "Swollen ankles.",
            "Legs are swollen.",
            "Shoes are tight in the evening.",
        ],
    ),
    (
        Latent::Course,
        [
            "Better than at the last visit.",
            "Has improved since last time.",
            "Says things are getting better.",
        ],
        [
            "Worse than at the last visit.",
            "Has declined since last time.",
            "Says things are getting worse.",
        ],
    ),
];

const OPENINGS: [&str; 4] = [
    "Seen in the clinic.",
    "Planned visit.",
    "Comes alone today.",
    "Visit with a relative.",
];

const CLOSINGS: [&str; 5] = [
    "Appetite as usual.",
    "Sleeps seven hours.",
    "Medication list reviewed.",
    "No allergies known.",
    "New appointment given.",
];

/// The note of a patient: an opening, the phrases in some order, a closing.
pub(super) fn note(seed: u64, draw: &Draw) -> String {
    let mut draws = Draws::of(seed, draw.subject_id, Stream::Notes);
    let mut sentences = vec![OPENINGS[draws.below(OPENINGS.len())]];
    let first = draws.below(PHRASES.len());
    for position in 0..PHRASES.len() {
        let (latent, low, high) = &PHRASES[(first + position) % PHRASES.len()];
        let phrases = if draw.value(*latent) < 0.0 { low } else { high };
        sentences.push(phrases[draws.below(phrases.len())]);
    }
    sentences.push(CLOSINGS[draws.below(CLOSINGS.len())]);
    sentences.join(" ")
}

#[cfg(test)]
mod tests {
    use super::super::model::Model;
    use super::super::options::SynthOptions;
    use super::*;

    #[test]
    fn the_factors_can_be_read_back() {
        let model = Model::new(&SynthOptions::default());
        let mut notes = std::collections::HashSet::new();
        for subject_id in 0..500 {
            let draw = model.draw(subject_id);
            let note = note(0, &draw);
            for (latent, low, high) in &PHRASES {
                let has = |phrases: &[&str; 3]| phrases.iter().any(|phrase| note.contains(phrase));
                assert_ne!(has(low), has(high), "{note}");
                assert_eq!(has(high), draw.value(*latent) > 0.0, "{note}");
            }
            notes.insert(note);
        }
        assert!(notes.len() > 300, "{}", notes.len());
    }
}
