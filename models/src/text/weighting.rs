//! Prompts whose words count more or less, in the syntax of A1111's web UI, as diffusers' long prompt weighting pipeline reads it:
//!
//! | | |
//! | --- | --- |
//! | `(words)` | 1.1 times as much |
//! | `[words]` | 1/1.1 times as much |
//! | `(words:1.3)` | 1.3 times as much |
//! | `\(`, `\)`, `\[`, `\]`, `\\` | the letter itself |
//!
//! Brackets inside of brackets multiply; one that is not closed counts to the end.

use crate::{Error, Result};

const ROUND: f64 = 1.1;
/// Weights beyond that, and products of them, are mistyped.
const MOST: f64 = 100.0;

/// The pieces of a prompt, each with its weight; neighbours differ in it.
///
/// # Errors
/// [`Error::Value`] for a weight that is no number, or not from −100 to 100, alone or with those around it.
pub fn weighted(prompt: &str) -> Result<Vec<(String, f64)>> {
    let mut pieces: Vec<(String, f64)> = Vec::new();
    let (mut round, mut square) = (Vec::new(), Vec::new());
    let multiply = |pieces: &mut [(String, f64)], from: usize, by: f64| {
        pieces[from..].iter_mut().for_each(|(_, weight)| *weight *= by);
    };
    let mut rest = prompt;
    while let Some(first) = rest.chars().next() {
        let mut length = first.len_utf8();
        match first {
            '\\' => {
                let next = rest[1..].chars().next().filter(|next| r"\()[]".contains(*next));
                // Before anything else it says nothing.
                pieces.push((next.map(String::from).unwrap_or_default(), 1.0));
                length += next.map_or(0, char::len_utf8);
            }
            '(' => round.push(pieces.len()),
            '[' => square.push(pieces.len()),
            ')' if !round.is_empty() => {
                multiply(&mut pieces, round.pop().unwrap_or_default(), ROUND);
            }
            ']' if !square.is_empty() => {
                multiply(&mut pieces, square.pop().unwrap_or_default(), 1.0 / ROUND);
            }
            ':' => match number(&rest[1..]) {
                Some(text) if !round.is_empty() => {
                    multiply(&mut pieces, round.pop().unwrap_or_default(), parsed(text)?);
                    length = 1 + text.len() + 1;
                }
                _ => pieces.push((":".into(), 1.0)),
            },
            ')' | ']' => pieces.push((first.into(), 1.0)),
            _ => {
                length = rest.find(|next| r"\()[]:".contains(next)).unwrap_or(rest.len());
                pieces.push((rest[..length].to_owned(), 1.0));
            }
        }
        rest = &rest[length..];
    }
    round.into_iter().for_each(|from| multiply(&mut pieces, from, ROUND));
    square.into_iter().for_each(|from| multiply(&mut pieces, from, 1.0 / ROUND));
    let mut merged: Vec<(String, f64)> = Vec::new();
    for (text, weight) in pieces {
        if weight.abs() > MOST {
            let remedy = format!(
                "brackets inside of brackets multiply; use fewer, or smaller weights: at most {MOST} in all"
            );
            return Err(Error::value(
                "prompt",
                format!("{text:?} with a weight of {weight}"),
                remedy,
            ));
        }
        match merged.last_mut().filter(|(_, last)| *last == weight) {
            Some((before, _)) => before.push_str(&text),
            None => merged.push((text, weight)),
        }
    }
    Ok(merged)
}

/// What stands before a closing bracket, if it could be a number.
fn number(text: &str) -> Option<&str> {
    let end = text.find(')')?;
    let digits = text[..end].strip_prefix(['+', '-']).unwrap_or(&text[..end]);
    let all = digits.chars().all(|letter| letter == '.' || letter.is_ascii_digit());
    (!digits.is_empty() && all).then_some(&text[..end])
}

fn parsed(text: &str) -> Result<f64> {
    let weight = text.parse::<f64>().ok().filter(|weight| weight.abs() <= MOST);
    weight.ok_or_else(|| {
        let remedy = "a weight is a number from -100 to 100, such as (words:1.3)";
        Error::value("prompt", format!("text with the weight {text}"), remedy)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The examples of `parse_prompt_attention` in diffusers' community pipelines, and what that function says of others.
    #[test]
    fn prompts_are_read_as_diffusers_community_reads_them() {
        let cases: [(&str, &[(&str, f64)]); 14] = [
            ("normal text", &[("normal text", 1.0)]),
            ("an (important) word", &[("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
            ("(unbalanced", &[("unbalanced", 1.1)]),
            (r"\(literal\]", &[("(literal]", 1.0)]),
            ("(unnecessary)(parens)", &[("unnecessaryparens", 1.1)]),
            (
                "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
                &[
                    ("a ", 1.0),
                    ("house", 1.3 * 1.1 * 1.1),
                    (" ", 1.1),
                    ("on", 1.0),
                    (" a ", 1.1),
                    ("hill", 0.55),
                    (", sun, ", 1.1),
                    ("sky", 1.1 * 1.1 * 1.1 * 1.1),
                    (".", 1.1),
                ],
            ),
            ("", &[]),
            ("a: b:1.3)", &[("a: b:1.3)", 1.0)]),
            ("[less] :)", &[("less", 1.0 / 1.1), (" :)", 1.0)]),
            (r"a\b \\", &[(r"ab \", 1.0)]),
            ("(a:-1)", &[("a", -1.0)]),
            ("(a:b)", &[("a:b", 1.1)]),
            ("(é:1.5)ü", &[("é", 1.5), ("ü", 1.0)]),
            ("]a)", &[("]a)", 1.0)]),
        ];
        for (prompt, expected) in cases {
            let pieces = weighted(prompt).unwrap();
            assert_eq!(pieces.len(), expected.len(), "{prompt}: {pieces:?}");
            for ((text, weight), (own, theirs)) in pieces.iter().zip(expected) {
                assert_eq!(text, own, "{prompt}");
                assert!((weight - theirs).abs() < 1e-12, "{prompt}: {weight}");
            }
        }
        for wrong in ["(a:1.2.3)", "(a:1000)", "(a:.)", "((a:20):20)", "b, (([a]:-50):3)"] {
            assert!(weighted(wrong).unwrap_err().to_string().contains("weight"), "{wrong}");
        }
    }
}
