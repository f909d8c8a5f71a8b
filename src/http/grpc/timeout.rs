//! How long a client of gRPC waits.

use std::time::Duration;

use axum::http::{HeaderMap, StatusCode};

use super::super::error::{Problem, quoted};

const TIMEOUT: &str = "grpc-timeout";

/// What the header `grpc-timeout` says, where there is one.
///
/// # Errors
/// 400 where it says nothing of the kind.
pub(in crate::http) fn asked(headers: &HeaderMap) -> Result<Option<Duration>, Problem> {
    let Some(value) = headers.get(TIMEOUT) else { return Ok(None) };
    let text = String::from_utf8_lossy(value.as_bytes());
    let found = duration(&text).ok_or_else(|| {
        let remedy = "it takes up to eight digits and a unit, H, M, S, m, u or n, as in 100m";
        Problem::value(TIMEOUT, quoted(&text), remedy)
    });
    found.map(Some)
}

/// The problem of a request that its client has waited for in vain.
pub(in crate::http) fn passed(waited: Duration) -> Problem {
    let message = format!(
        "the request was not done within {} s ({TIMEOUT}); wait longer, ask for fewer rows, or try when the server is less busy",
        waited.as_secs_f64()
    );
    Problem::new(StatusCode::GATEWAY_TIMEOUT, "grpc_timeout", message)
}

fn duration(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let fits = (1..=8).contains(&digits.len()) && digits.bytes().all(|byte| byte.is_ascii_digit());
    let number: u64 = digits.parse().ok().filter(|_| fits)?;
    match unit {
        "H" => Some(Duration::from_secs(number * 3600)),
        "M" => Some(Duration::from_secs(number * 60)),
        "S" => Some(Duration::from_secs(number)),
        "m" => Some(Duration::from_millis(number)),
        "u" => Some(Duration::from_micros(number)),
        "n" => Some(Duration::from_nanos(number)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_and_its_unit() {
        assert_eq!(duration("2H"), Some(Duration::from_secs(7200)));
        assert_eq!(duration("3M"), Some(Duration::from_secs(180)));
        assert_eq!(duration("4S"), Some(Duration::from_secs(4)));
        assert_eq!(duration("100m"), Some(Duration::from_millis(100)));
        assert_eq!(duration("99999999u"), Some(Duration::from_micros(99_999_999)));
        assert_eq!(duration("0n"), Some(Duration::ZERO));
        for wrong in ["", "S", "1", "1s", "-1S", "+1S", "123456789S", "1.5S", "1 S", "1é"] {
            assert_eq!(duration(wrong), None, "{wrong:?}");
        }
    }
}
