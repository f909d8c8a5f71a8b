//! Whether to use a student, in a sentence.

use serde::Serialize;

use super::{
    comparison::{Comparison, mean},
    shown,
};

/// How good a student is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Level {
    /// As good as its teacher, and faster.
    Good,
    /// A little worse.
    Usable,
    /// Not good enough.
    NotYet,
    /// Too little was measured to tell.
    Unknown,
}

/// A judgement and its reason.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Verdict {
    /// How good it is.
    pub(crate) level: Level,
    /// A sentence that says so, with its reason.
    pub(crate) sentence: String,
    /// What to do next.
    pub(crate) next: &'static str,
}

/// Images by feature, below which a distance says more of the number of images than of the models.
const IMAGES_BY_FEATURE: usize = 5;
/// Least quotient of precision and recall, student by teacher, of a student as good as its teacher, and of one that is
/// usable.
const GOOD: f64 = 0.9;
const USABLE: f64 = 0.75;
/// Below this a student is bad however few images there are.
const FAR_OFF: f64 = 0.4;
/// Greatest quotient of distances to a reference, likewise.
const GOOD_DISTANCE: f64 = 1.15;
const USABLE_DISTANCE: f64 = 1.5;
/// Speed-ups below this are not worth a second model.
const FASTER: f64 = 1.1;

impl Verdict {
    /// Judges by precision and recall, and where there is a reference that is not the teacher by the distance to it.
    pub(crate) fn of(comparison: &Comparison) -> Self {
        let speed = comparison.speed_up();
        let faster =
            speed.map_or(String::new(), |it| format!(" at {} × the speed", shown(it, None)));
        let similar = format!(
            "on the same seeds its images are {} dB from the teacher's",
            shown(mean(&comparison.psnr_db), None)
        );
        let Some(width) = comparison.feature_width else {
            return Self {
                level: Level::Unknown,
                sentence: format!(
                    "Look at the images: without a feature network for images of this size no quality can be told; {similar}{faster}."
                ),
                next: "Train a small classifier with `understudy train-judge`, or give --features inception with its weights, and evaluate again.",
            };
        };
        let needed = IMAGES_BY_FEATURE * width;
        let ratio = |name: &str| {
            comparison.scores.iter().find(|it| it.name.starts_with(name)).and_then(|it| it.ratio())
        };
        let (precision, recall) = (ratio("Precision"), ratio("Recall"));
        let worst = precision.unwrap_or(1.0).min(recall.unwrap_or(1.0));
        // Few images do not hide that a student is far off.
        if comparison.images < needed && worst >= FAR_OFF {
            return Self {
                level: Level::Unknown,
                sentence: format!(
                    "Too few images to tell: {} were made, {width} features want at least {needed}; {similar}{faster}.",
                    comparison.images
                ),
                next: "Evaluate with more images (--n).",
            };
        }
        let there = |name: &str| comparison.scores.iter().any(|it| it.name.starts_with(name));
        let (Some(precision), Some(recall)) = (precision, recall) else {
            if there("Precision") && there("Recall") {
                return Self {
                    level: Level::Unknown,
                    sentence: format!(
                        "Look at the images: the teacher's precision or recall is 0, and nothing can be held against that; {similar}{faster}."
                    ),
                    next: "Evaluate with more images (--n), or against others (--reference).",
                };
            }
            return Self {
                level: Level::Unknown,
                sentence: format!(
                    "Look at the images: the reference has statistics alone; {similar}{faster}."
                ),
                next: "Evaluate against images (--reference), or leave --reference out.",
            };
        };
        let distance = match comparison.against_teacher {
            true => None,
            false => ratio("Fréchet"),
        };
        let within = |least: f64, most: f64| worst >= least && distance.is_none_or(|it| it <= most);
        let percent = |ratio: f64| format!("{:.0} %", 100.0 * ratio);
        let mut reason = format!(
            "it keeps {} of the teacher's precision (how good single images are) and {} of its recall (how varied they are)",
            percent(precision),
            percent(recall)
        );
        if let Some(distance) = distance {
            reason += &format!(", at {} × its distance", shown(distance, None));
        }
        let slow = speed.is_some_and(|it| it < FASTER);
        let (level, judgement, next) = if slow {
            (
                Level::NotYet,
                "Do not use it: it is hardly faster than its teacher;",
                "Distil a narrower one, such as `--student 0.5x`.",
            )
        } else if within(GOOD, GOOD_DISTANCE) {
            (
                Level::Good,
                "Use it:",
                "Serve it beside its teacher and compare them on live traffic (`--shadow-rate 0.1`).",
            )
        } else if within(USABLE, USABLE_DISTANCE) {
            (
                Level::Usable,
                "Usable, with a loss that shows:",
                "Train longer (`--steps`, going on with `--student` and this folder), or distil a wider one, such as `--student 0.7x`.",
            )
        } else if worst >= USABLE {
            (
                Level::NotYet,
                "Not yet: its images are further from the reference than its teacher's;",
                "Train longer; then a wider student, such as `--student 0.7x`.",
            )
        } else if recall < precision {
            (
                Level::NotYet,
                "Not yet: its images are less varied than the teacher's;",
                "Train longer, with a larger pool (`--rho`).",
            )
        } else {
            (
                Level::NotYet,
                "Not yet: its images are worse than the teacher's;",
                "Train longer; then a wider student, such as `--student 0.7x`.",
            )
        };
        Self { level, sentence: format!("{judgement} {reason}{faster}."), next }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::comparison::{Compared, Speed};

    /// A comparison of so many images of a student with these shares of its teacher's precision and recall.
    fn compared(images: usize, [precision, recall]: [f64; 2], speed_up: f64) -> Comparison {
        let score = |name: &str, student: f64| Compared {
            name: name.into(),
            more_is_better: true,
            teacher: vec![0.8],
            student: vec![0.8 * student],
        };
        Comparison {
            teacher: "t".into(),
            student: "s".into(),
            images,
            runs: 1,
            features: Some("f".into()),
            distance: Some("FD-f".into()),
            feature_width: Some(128),
            against_teacher: true,
            steps: [20, 20],
            scores: vec![score("Precision", precision), score("Recall", recall)],
            psnr_db: vec![26.0],
            ssim: vec![0.9],
            speed: vec![Speed {
                batch: 8,
                decode_ms: 0.0,
                teacher_ms: speed_up,
                student_ms: 1.0,
                ratio: [speed_up; 3],
            }],
            first: Vec::new(),
            least_alike: Vec::new(),
        }
    }

    #[test]
    fn a_verdict_follows_from_quality_speed_and_how_much_was_measured() {
        for (images, shares, speed_up, level, words) in [
            (2000, [0.95, 0.92], 2.2, Level::Good, "Use it"),
            (2000, [0.95, 0.8], 2.2, Level::Usable, "Usable"),
            (2000, [0.95, 0.5], 2.2, Level::NotYet, "less varied"),
            (2000, [0.5, 0.95], 2.2, Level::NotYet, "worse than the teacher's"),
            (2000, [0.95, 0.95], 1.0, Level::NotYet, "hardly faster"),
            (600, [0.95, 0.95], 2.2, Level::Unknown, "at least 640"),
            (600, [0.95, 0.1], 2.2, Level::NotYet, "less varied"),
        ] {
            let verdict = Verdict::of(&compared(images, shares, speed_up));
            assert_eq!(verdict.level, level, "{}", verdict.sentence);
            assert!(verdict.sentence.contains(words), "{}", verdict.sentence);
        }
        // A student that takes fewer evaluations is faster by that, too.
        let few = Comparison { steps: [20, 4], ..compared(2000, [0.95, 0.95], 2.0) };
        assert!(Verdict::of(&few).sentence.contains("at 10.0 × the speed"));
        // Precision and recall would do, the distance does not.
        let mut far = Comparison { against_teacher: false, ..compared(2000, [0.95, 0.94], 2.0) };
        far.scores.push(Compared {
            name: "Fréchet distance".into(),
            more_is_better: false,
            teacher: vec![1.0],
            student: vec![1.6],
        });
        assert!(Verdict::of(&far).sentence.contains("further from the reference"));
        let mut none = compared(2000, [0.95, 0.94], 2.0);
        none.scores[1].teacher = vec![0.0];
        assert!(Verdict::of(&none).sentence.contains("precision or recall is 0"));
        let alone = Comparison { feature_width: None, ..compared(2000, [0.95, 0.95], 2.0) };
        assert_eq!(Verdict::of(&alone).level, Level::Unknown);
    }
}
