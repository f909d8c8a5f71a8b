//! Whose part a request is: the W3C's `traceparent` and `tracestate` (<https://www.w3.org/TR/trace-context/>).
//!
//! OpenTelemetry's propagator takes some of what the recommendation calls invalid, such as ids that are too short.

use std::str::FromStr;

use axum::http::{HeaderMap, HeaderName};
use opentelemetry::trace::{SpanContext, SpanId, TraceFlags, TraceId, TraceState};

const PARENT: HeaderName = HeaderName::from_static("traceparent");
const STATE: HeaderName = HeaderName::from_static("tracestate");

/// Characters of a `traceparent` of version 00; those of later versions begin like it.
const CHARACTERS: usize = 55;

/// The span that a request says it is part of. A header that is invalid, or there twice, is as good as none.
pub(super) fn of(headers: &HeaderMap) -> Option<SpanContext> {
    let mut parents = headers.get_all(PARENT).iter();
    let (parent, None) = (parents.next()?, parents.next()) else { return None };
    let (trace, span, flags) = parsed(parent.to_str().ok()?.trim_matches([' ', '\t']))?;
    let states = headers.get_all(STATE).iter().map(|value| value.to_str().ok());
    let states: Option<Vec<&str>> = states.collect();
    // A state that is invalid is dropped, and the parent is kept.
    let state = states.and_then(|states| TraceState::from_str(&states.join(",")).ok());
    let context = SpanContext::new(trace, span, flags, true, state.unwrap_or_default());
    Some(context).filter(SpanContext::is_valid)
}

fn parsed(text: &str) -> Option<(TraceId, SpanId, TraceFlags)> {
    let (known, rest) = text.split_at_checked(CHARACTERS)?;
    let [version, trace, span, flags]: [&str; 4] =
        known.split('-').collect::<Vec<_>>().try_into().ok()?;
    let ends =
        if version == "00" { rest.is_empty() } else { matches!(rest.as_bytes(), [] | [b'-', ..]) };
    if version == "ff" || !ends {
        return None;
    }
    hexadecimal(version, 2)?;
    let trace = TraceId::from_hex(hexadecimal(trace, 32)?).ok()?;
    let span = SpanId::from_hex(hexadecimal(span, 16)?).ok()?;
    let flags = u8::from_str_radix(hexadecimal(flags, 2)?, 16).ok()?;
    // Those that nobody knows are not passed on.
    Some((trace, span, TraceFlags::new(flags) & TraceFlags::SAMPLED))
}

/// So many digits, in lower case.
fn hexadecimal(text: &str, digits: usize) -> Option<&str> {
    let lower = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
    (text.len() == digits && text.bytes().all(lower)).then_some(text)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const TRACE: &str = "12345678901234567890123456789012";
    const SPAN: &str = "1234567890123456";

    fn given(parents: &[&str], states: &[&str]) -> Option<SpanContext> {
        let mut headers = HeaderMap::new();
        for parent in parents {
            headers.append(PARENT, parent.parse().unwrap());
        }
        for state in states {
            headers.append(STATE, state.parse().unwrap());
        }
        of(&headers)
    }

    /// The cases are those of the W3C's own tests (<https://github.com/w3c/trace-context/blob/main/test/test.py>).
    #[test]
    fn a_valid_parent_is_taken_and_any_other_is_as_good_as_none() {
        let parent = |text: String| given(&[&text], &[]);
        for version in ["00", "01", "cc"] {
            let found = parent(format!("{version}-{TRACE}-{SPAN}-01")).unwrap();
            assert_eq!(found.trace_id().to_string(), TRACE);
            assert_eq!(found.span_id().to_string(), SPAN);
            assert!(found.is_remote() && found.is_sampled());
        }
        assert!(parent(format!("cc-{TRACE}-{SPAN}-01-what-the-future-will-be-like")).is_some());
        assert!(parent(format!("  00-{TRACE}-{SPAN}-01\t")).is_some());
        let flags = |flags: &str| parent(format!("00-{TRACE}-{SPAN}-{flags}")).unwrap();
        assert!(!flags("00").is_sampled() && flags("ff").is_sampled());
        assert_eq!(flags("ff").trace_flags(), TraceFlags::SAMPLED);

        for text in [
            format!("00-{TRACE}-{SPAN}-01-"),
            format!("00-{TRACE}-{SPAN}-01.extra"),
            format!("00-{TRACE}-{SPAN}-01-extra"),
            format!("cc-{TRACE}-{SPAN}-01.extra"),
            format!("ff-{TRACE}-{SPAN}-01"),
            format!(".0-{TRACE}-{SPAN}-01"),
            format!("0.-{TRACE}-{SPAN}-01"),
            format!("CC-{TRACE}-{SPAN}-01"),
            format!("0-{TRACE}-{SPAN}-01"),
            format!("000-{TRACE}-{SPAN}-01"),
            format!("00-{}-{SPAN}-01", "0".repeat(32)),
            format!("00-{}-{SPAN}-01", ".".repeat(32)),
            format!("00-{}-{SPAN}-01", "A".repeat(32)),
            format!("00-{}-{SPAN}-01", &TRACE[1..]),
            format!("00-+{}-{SPAN}-01", &TRACE[1..]),
            format!("00-{TRACE}0-{SPAN}-01"),
            format!("00-{TRACE}-{}-01", "0".repeat(16)),
            format!("00-{TRACE}-{}-01", "B".repeat(16)),
            format!("00-{TRACE}-{}-01", &SPAN[1..]),
            format!("00-{TRACE}-{SPAN}-.0"),
            format!("00-{TRACE}-{SPAN}-0"),
            format!("00-{TRACE}-{SPAN}-001"),
            format!("00-{TRACE}-{SPAN}-"),
            format!("00-{TRACE}-{SPAN}"),
            String::new(),
        ] {
            assert!(parent(text.clone()).is_none(), "{text}");
        }
        let whole = format!("00-{TRACE}-{SPAN}-01");
        assert!(given(&[&whole, &whole], &[]).is_none());
    }

    #[test]
    fn states_are_joined_and_one_that_is_invalid_costs_no_parent() {
        let parent = [&*format!("00-{TRACE}-{SPAN}-01")];
        let joined = given(&parent, &["foo=1,bar=2", "baz=3"]).unwrap();
        assert_eq!(joined.trace_state().header(), "foo=1,bar=2,baz=3");
        let invalid = given(&parent, &["foo"]).unwrap();
        assert_eq!(invalid.trace_state().header(), "");
    }
}
